"""cortex, neuron and a real vLLM on the CPU, as their users run them."""
