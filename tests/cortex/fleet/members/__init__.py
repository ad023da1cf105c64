"""Neurons that cortex finds."""
