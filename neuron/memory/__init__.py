"""GPU and host memory: what can be booked on each device, what is promised to each engine, and which devices it gets.
`neuron.lifecycle` calls it, `neuron.api` shows its figures, and harnesses say what an engine requires."""
