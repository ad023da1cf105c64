"""The simulated engine's HTTP surface: one module per family of routes."""
