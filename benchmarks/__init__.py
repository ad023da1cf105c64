"""What cortex costs beside nginx and other gateways: `python -m benchmarks --help`."""
