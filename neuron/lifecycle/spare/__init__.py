"""Processes that have imported an engine's modules before a load asks for them, and become engines."""
