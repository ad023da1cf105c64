"""Harnesses: how engines of one kind are started and what their output means."""

from __future__ import annotations

from neuron.config import HarnessName
from neuron.harness.base import EngineCommand, Harness, HostFacts, LaunchPlan
from neuron.harness.sim import SimHarness
from neuron.harness.vllm import VllmHarness

__all__ = ["HARNESSES", "EngineCommand", "Harness", "HostFacts", "LaunchPlan"]

HARNESSES: dict[HarnessName, Harness] = {"vllm": VllmHarness(), "sim": SimHarness()}
