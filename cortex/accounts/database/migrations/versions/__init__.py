"""One module for each migration, `m` and its number in the name, each after the one before it."""
