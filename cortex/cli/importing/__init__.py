"""`cortex import`: turns the configuration of llama-swap, LiteLLM or Ollama into a models.toml, and says what it could
not carry over. Only `cortex.cli.commands` calls it."""
