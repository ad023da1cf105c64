"""A guard against regressions that needs no clock: instructions that cortex executes for a request and for a chunk."""
