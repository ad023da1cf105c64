"""What the simulated engine does with a request: admission, tokens, timing, faults, metrics."""
