"""A fake engine: answers like vLLM, with precomputed bytes, as asked for in the prompt."""
