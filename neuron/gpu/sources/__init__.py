"""Where devices come from besides NVML and simulation: AMD's library, and neuron.toml. Beside them what the sources
over a driver's library have in common."""
