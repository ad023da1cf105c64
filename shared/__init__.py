"""What cortex and neuron share: the wire protocol, errors, settings, logs and how a service runs. Both import it; it
imports neither."""

__version__ = "0.1.0"
