"""What a model's files say: config.json and safetensors headers. Used by the rest of `neuron.estimate` and by
estimators."""
