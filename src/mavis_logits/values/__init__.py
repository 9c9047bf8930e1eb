"""Value functions: value models and value heads, how they are read from files, and several of them as one."""
