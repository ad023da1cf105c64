"""The engines that this neuron can run, by name. A new engine is a new folder and one line here."""

from __future__ import annotations

from neuron.config import HarnessName
from neuron.harness.base import Harness
from neuron.harness.sim import SimHarness
from neuron.harness.vllm.command import VllmHarness

HARNESSES: dict[HarnessName, Harness] = {"vllm": VllmHarness(), "sim": SimHarness()}
