"""cortex.toml and models.toml: read, validated, compared, and the configuration in force. Every other package may read
it; it imports none of them."""
