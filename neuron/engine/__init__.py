"""One engine as an operating-system process: started, watched, its output, ports and run record. `neuron.lifecycle`
calls it, and its launcher owns the port pool."""
