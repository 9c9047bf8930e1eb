"""What people do in place of value functions, each in the same place as them: a setting of `mavis evaluate`."""
