"""The engines that this neuron can run, by name: those with code of their own, and those that neuron.toml describes.
Pure.

To add one with code: a new package with a `Harness`, and one line in `HARNESSES`."""

from __future__ import annotations

from neuron.config import NeuronConfig
from neuron.harness.base import Harness
from neuron.harness.command.harness import CommandHarness
from neuron.harness.sim import SimHarness
from neuron.harness.vllm.command import VllmHarness

HARNESSES: dict[str, Harness] = {"vllm": VllmHarness(), "sim": SimHarness()}


def is_known(name: str, config: NeuronConfig) -> bool:
    """True when there is a harness of this name, offered or not."""
    return name in HARNESSES or config.harness_settings(name).described


def harness_of(name: str, config: NeuronConfig) -> Harness:
    """The harness of this name. Raises KeyError when there is none."""
    settings = config.harness_settings(name)
    return CommandHarness(settings) if settings.described else HARNESSES[name]
