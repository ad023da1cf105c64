"""A fleet of real processes under load, in which engines, neurons and a cortex are killed all the time."""
