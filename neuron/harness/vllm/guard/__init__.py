"""Runs inside the engine's own Python. This directory is put on the engine's PYTHONPATH, so it holds nothing else and
imports nothing of neuron."""
