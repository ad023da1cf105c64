"""Coding agents in their non-interactive mode."""
