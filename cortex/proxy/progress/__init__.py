"""What becomes of a request that names a model: where it is, and its account."""
