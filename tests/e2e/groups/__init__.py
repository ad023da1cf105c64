"""Engines that span two neurons, behind a cortex: real neurons, simulated engines."""
