"""`cortex simulate`: the scheduler and the loader on a virtual clock, with a fleet and a trace of requests in and
waiting times out. Only the command line and the benchmarks call it."""
