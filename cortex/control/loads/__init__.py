"""Carries out what was decided: drains and evicts engines, and loads others."""
