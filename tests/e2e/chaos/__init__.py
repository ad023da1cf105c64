"""A fleet of real processes under load, with engines, neurons and a cortex killed at random."""
