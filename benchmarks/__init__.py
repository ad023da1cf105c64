"""Measures cortex next to nginx and other gateways: `python -m benchmarks --help`."""
