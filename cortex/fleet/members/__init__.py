"""Which neurons the fleet has: those that cortex.toml lists and those that are found. `cortex.control.wiring` builds
it, `cortex.control.reload` gives it each new configuration, and the API hands it the neurons that register."""
