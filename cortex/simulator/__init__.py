"""`cortex simulate`: runs the real scheduler and loader on virtual time, with simulated neurons and requests. Only the
command line and the benchmarks call it."""
