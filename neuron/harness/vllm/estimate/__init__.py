"""vLLM's memory estimate, by the rules of vLLM 0.32. The harness calls `estimator`."""
