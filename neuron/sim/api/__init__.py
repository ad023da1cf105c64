"""The HTTP API of a simulated engine: OpenAI's, Anthropic's and vLLM's own routes. Called by `neuron.sim.process`."""
