"""One engine as an operating-system process: started, watched, its output, ports and run record. `neuron.lifecycle`
calls it; `neuron.app` creates its port pool and state directory."""
