"""Harnesses: how engines of one kind are started, and what their output means. The rest of neuron knows an engine only
through `base` and looks it up in `registry`."""
