"""The engines that this neuron can run, by name. To add one: a new package with a `Harness`, and one line here."""

from __future__ import annotations

from neuron.harness.base import Harness
from neuron.harness.sim import SimHarness
from neuron.harness.vllm.command import VllmHarness

HARNESSES: dict[str, Harness] = {"vllm": VllmHarness(), "sim": SimHarness()}
