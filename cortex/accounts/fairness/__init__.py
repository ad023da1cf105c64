"""Fair shares of the callers: the order of waiting requests, and the accounts of who has used how much of the GPUs.
Pure."""
