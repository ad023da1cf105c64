"""What neuron asks of a running vLLM through the routes that the guard keeps for it."""
