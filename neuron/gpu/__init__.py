"""GPU topology and memory, from NVML or simulated, behind one interface (`topology`). `neuron.memory`,
`neuron.estimate` and `neuron.lifecycle` read it; `neuron.app` and `neuron.commands` choose the source."""
