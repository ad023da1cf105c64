"""A fake engine: answers like vLLM, with precomputed bytes. The prompt says which answer it wants."""
