"""Reads, validates and compares cortex.toml and models.toml, and holds the current configuration. Every other
package may import it; it imports none of them."""
