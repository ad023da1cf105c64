"""Everything that is specific to vLLM: its command line, flags and environment, its output and metrics, sleep mode,
memory estimate, and the guard that runs inside it. Called through `VllmHarness`; the simulated engine imitates it."""
