"""One engine as an operating-system process: started, watched, its output, ports and run record. `neuron.lifecycle` is
its only caller."""
