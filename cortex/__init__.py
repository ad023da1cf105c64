"""cortex: the single front door of a fleet of neurons."""
