"""The simulated engine: a process with vLLM's command line, output and HTTP API, and no weights. `neuron.harness.sim`
starts it as `python -m neuron.sim`; nothing imports it. Layers: `process` > `api` > `engine`."""
