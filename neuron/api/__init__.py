"""neuron's HTTP API: routes, log following, estimates. Only `neuron.app` mounts it."""
