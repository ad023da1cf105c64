"""Several instances of a model on one host and on several."""
