"""What cortex and neuron have in common: the wire protocol, errors, settings and how a service runs."""

__version__ = "0.1.0"
