"""The simulated engine as a process: command line, output, load, memory, sleep and shutdown."""
