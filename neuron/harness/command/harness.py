"""The harness of an engine that a table of neuron.toml describes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from neuron.config import HarnessSettings
from neuron.harness.base import EngineCommand, Harness, LaunchFacts, LaunchPlan
from neuron.harness.command.activity import MetricsProbe
from neuron.harness.command.placeholders import (
    filled,
    filled_environment,
    matching_flag,
    placeholders_in,
    values_of,
)
from neuron.harness.command.reading import DescribedLoadReading, failure_of, root_cause
from neuron.harness.environment import NO_DEVICES, device_ids, device_variables, engine_environment
from neuron.progress.phases import LoadReading
from neuron.spec import EngineSpec
from shared.protocol import FailureCause

_TRANSLATABLE: Final = ("/v1/messages", "/v1/messages/count_tokens", "/v1/responses")


class CommandHarness(Harness):
    """Everything particular to the engine comes from `settings`, in which its preset is already merged."""

    def __init__(self, settings: HarnessSettings) -> None:
        self._settings = settings
        words = [*(settings.command or ()), *settings.arguments, *settings.extra_args, *settings.env.values()]
        self._used = frozenset(name for word in words for name in placeholders_in(word))
        self.health_path = settings.health_path
        self.api_prefix = settings.api_prefix
        self.context_field = settings.context_field
        self.runs_on_gpu = settings.devices != "none"
        self.takes_key = "key" in self._used
        self.waits_for_line = settings.ready_pattern is not None
        self.keeps_booking = settings.memory == "booked"
        self.stop_signal = settings.stop_signal
        self.paths = None if settings.paths is None else tuple(settings.paths)
        self.python_package = settings.python_package
        self.version_arguments = tuple(settings.version_arguments)
        self.version_pattern = settings.version_pattern
        missing = settings.missing_paths
        if settings.paths is not None:
            missing = [*missing, *(path for path in _TRANSLATABLE if path not in settings.paths)]
        self.missing_paths = tuple(dict.fromkeys(missing))
        self.activity = None if settings.activity == "none" else MetricsProbe(settings.activity)

    def program(self, settings: HarnessSettings) -> tuple[str, ...]:
        command = tuple(settings.command or ())
        return () if any(map(placeholders_in, command)) else command

    def command(self, plan: LaunchPlan, facts: LaunchFacts) -> EngineCommand:
        settings = plan.settings
        values = values_of(plan, facts, by=settings.device_ids)
        words = [*(settings.command or ()), *settings.arguments]
        # The operator's `extra_args` may have placeholders, a model's `args` are passed as they are.
        argv = [*filled(words, values), *plan.spec.args, *filled(settings.extra_args, values)]
        told = filled_environment(settings.env, values)
        # A variable that is left out must not have the value of neuron's own environment: that may be another's key.
        inherited = {name: value for name, value in facts.environ.items() if name not in settings.env}
        own = self._device_variables(plan, facts)
        filled_plan = replace(plan, settings=settings.model_copy(update={"env": told}))
        return EngineCommand(tuple(argv), engine_environment(filled_plan, inherited, own, {}))

    def keep_alive_secs(self, env: Mapping[str, str]) -> float | None:
        return self._settings.keep_alive_secs

    def refused_argument(self, args: Sequence[str]) -> str | None:
        found = matching_flag(args, self._settings.reserved_arguments)
        return None if found is None else f"{found[0]!r}: {found[1]} is set by neuron"

    def refused_spec(self, spec: EngineSpec) -> tuple[str, str] | None:
        for name in ("pipeline_parallel", "data_parallel"):
            size = getattr(spec, name)
            if size > 1 and name not in self._used:
                return "parallel", f"{name} is {size}, but the command line has no {{{name}}}"
        if spec.expert_parallel:
            return "parallel", "its command line has no placeholder for expert parallelism"
        if spec.context is not None and "context" not in self._used:
            return "max_model_len", "its command line has no {context}"
        twice = None if spec.max_model_len is None else matching_flag(spec.args, self._settings.context_arguments)
        if twice is not None:
            return "max_model_len", f"{twice[1]} is in its args too, remove one of them"
        if spec.served_names and "names" not in self._used:
            return "served_names", "its command line has no {names}"
        return None

    def code_argument(self, args: Sequence[str]) -> str | None:
        found = matching_flag(args, self._settings.code_arguments)
        return None if found is None else found[0]

    def first_reading(self) -> LoadReading:
        return DescribedLoadReading(tuple(self._settings.progress), self._settings.ready_pattern)

    def root_cause(self, lines: Sequence[str]) -> str | None:
        return root_cause(lines, self._settings.errors)

    def cause_of(self, error: str, *, path_missing: bool) -> FailureCause:
        return FailureCause.NODE if path_missing else failure_of(error, self._settings.errors)[0]

    def is_permanent(self, error: str, *, path_missing: bool) -> bool:
        return path_missing or failure_of(error, self._settings.errors)[1]

    def _device_variables(self, plan: LaunchPlan, facts: LaunchFacts) -> dict[str, str]:
        """The variables that show the engine its GPUs; without any they hide those of the host."""
        setting = self._settings.devices
        if setting == "none" or not (plan.devices or facts.has_gpu):
            return {}
        if setting != "auto":
            return {setting: ",".join(device_ids(plan.devices, self._settings.device_ids))}
        return device_variables(plan.devices, facts, self._settings.device_ids) if plan.devices else dict(NO_DEVICES)
