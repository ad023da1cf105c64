"""The files in deploy/ that people copy."""
