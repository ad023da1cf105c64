"""`cortex import`: files as their programs' users have them."""
