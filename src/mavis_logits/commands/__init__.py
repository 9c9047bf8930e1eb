"""What `mavis` runs: a file for each command that needs no training."""
