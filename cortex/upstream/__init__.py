"""Connections to engines and neurons: the pool, one connection, and what is read from an answer as it passes. The proxy
and the neuron client send through it."""
