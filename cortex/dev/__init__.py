"""`cortex dev`: the whole stack on one machine, without a GPU and without a file."""
