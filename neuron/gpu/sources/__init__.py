"""Where devices come from besides NVML and simulation: AMD's library, and neuron.toml. Beside them the thread that
drivers' libraries run in."""
