"""Reads, validates and compares cortex.toml and models.toml, and holds the current configuration. Most
packages read it; of them it imports only `cortex.http`, for the header names that settings may not use."""
