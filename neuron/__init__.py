"""neuron: the agent on a GPU host. Reads its topology, runs engines, answers a cortex."""
