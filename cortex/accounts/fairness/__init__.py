"""Fair shares of the callers: the order of waiting requests, and the GPU time that each caller has used. Pure."""
