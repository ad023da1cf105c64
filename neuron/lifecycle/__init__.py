"""The models of this host: admitted, loaded, supervised, put to sleep, unloaded and adopted after a restart.
`neuron.api` calls the registry; nothing below imports it."""
