"""Tests of the package shared."""
