"""A simulated engine's processes: server, core, load and shutdown. Called by `neuron.sim.__main__`."""
