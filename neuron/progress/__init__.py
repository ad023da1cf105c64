"""How far a load is and how long it will still take, from the engine's output and from earlier loads. Called by
`neuron.lifecycle`; harnesses provide the readings, and `neuron.app` the store of earlier loads."""
