"""Engines that span several neurons: the parts as each neuron sees them."""
