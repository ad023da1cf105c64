"""GPU and host memory as bookings: what each device still has, what a model is promised, and which devices it gets.
`neuron.lifecycle` calls it."""
