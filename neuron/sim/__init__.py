"""The simulated engine: a process with vLLM's HTTP surface and none of its weights."""
