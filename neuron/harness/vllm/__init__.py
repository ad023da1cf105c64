"""Everything that is specific to vLLM: its command line and argument policy, the meaning of its output and metrics,
sleep mode, and the guard that runs inside it."""
