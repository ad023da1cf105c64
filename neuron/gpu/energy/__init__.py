"""Energy of the GPUs: measured for each device, and shared among the engines on it."""
