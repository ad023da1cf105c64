"""What a model's files say: config.json and safetensors headers. Read by the rest of `neuron.estimate`."""
