"""The simulated model server without HTTP: settings, admission, tokens, timing, faults, metrics, device memory and
console output. Called by `neuron.sim.api` and `neuron.sim.process`."""
