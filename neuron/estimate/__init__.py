"""How much memory a model needs, from its own files, before it is loaded: model arithmetic for any engine.

An engine's own rules are a `MemoryEstimator` in its harness. `neuron.lifecycle` and `neuron.api` call
`estimator.estimate_of`.
"""
