"""Clients of other projects against cortex, a neuron and simulated engines. docs/clients.md lists them."""
