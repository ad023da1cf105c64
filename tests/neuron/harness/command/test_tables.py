"""Tables of neuron.toml that describe engines: what is offered, and which mistakes are found at startup."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neuron.harness.checks import CheckedConfig
from neuron.harness.command.preset_files import preset_names
from shared.settings import SettingsError, load_settings


def loaded(tmp_path: Path, text: str) -> CheckedConfig:
    path = tmp_path / "neuron.toml"
    path.write_text(text, encoding="utf-8")
    return load_settings(CheckedConfig, path, env_prefix="NEURON_", environ={})


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("", ["vllm"]),
        ("[harness.vllm]\n", ["vllm"]),
        ('[harness.a]\npreset = "llama.cpp"\n', ["a"]),
        ('[harness.a]\npreset = "llama.cpp"\n[harness.vllm]\n', ["a", "vllm"]),
        ('[[harnesses]]\nname = "vllm"\n[harness.a]\npreset = "llama.cpp"\n', ["vllm", "a"]),
        ('[[harnesses]]\nname = "a"\n[[harnesses]]\nname = "sim"\n[harness.a]\npreset = "sglang"\n', ["a", "sim"]),
        ('[harness.a]\nkind = "command"\ncommand = "serve --port {port}"\n', ["a"]),
    ],
)
def test_described_engines_are_offered(tmp_path: Path, text: str, offered: list[str]) -> None:
    """A table that describes an engine offers it; `[[harnesses]]` decides the order, and may be left out."""
    assert loaded(tmp_path, text).harness_names == offered


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_a_complete_description(tmp_path: Path, preset: str) -> None:
    table = loaded(tmp_path, f'[harness.mine]\npreset = "{preset}"\n').harness["mine"]
    assert table.command
    assert table.described


def test_keys_of_a_table_override_its_preset(tmp_path: Path) -> None:
    """Each one alone; `env` by variable. A program without placeholders keeps the preset's arguments, a whole command
    line replaces them."""
    text = (
        '[harness.a]\npreset = "llama.cpp"\ncommand = ["/opt/llama-server"]\nenv = { X = "1" }\nhealth_path = "/up"\n'
    )
    preset = loaded(tmp_path, '[harness.a]\npreset = "llama.cpp"\n').harness["a"]
    table = loaded(tmp_path, text).harness["a"]
    assert (table.command, table.health_path, table.arguments) == (["/opt/llama-server"], "/up", preset.arguments)
    assert table.env == {**preset.env, "X": "1"}
    whole = loaded(tmp_path, '[harness.a]\npreset = "llama.cpp"\ncommand = "my-server -m {model} -p {port}"\n')
    assert (whole.harness["a"].command, whole.harness["a"].arguments) == (
        ["my-server", "-m", "{model}", "-p", "{port}"],
        [],
    )


COMMAND = 'kind = "command"\ncommand = "serve --port {port}"\n'


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            'preset = "llama"\n',
            "harness.a: preset = 'llama': unknown preset (known: infinity, llama-cpp-python, llama.cpp",
        ),
        ('kind = "docker"\n', "harness.a.kind = 'docker': "),
        ('kind = "command"\n', 'harness.a: command: required with kind = "command"'),
        ('kind = "command"\ncommand = []\n', "harness.a.command = []: "),
        ('kind = "command"\ncommand = "serve \'x"\n', 'harness.a.command = "serve \'x": cannot be split into words'),
        ('kind = "command"\ncommand = "serve"\n', "harness.a: command: nothing tells the engine its port"),
        (
            'kind = "command"\ncommand = ["serve", "{prot}"]\n',
            "harness.a: command[1] = '{prot}': unknown placeholder {prot}, did you mean {port}? (known: ",
        ),
        (f'{COMMAND}env = {{ K = "{{kye}}" }}\n', "harness.a: env.K = '{kye}': unknown placeholder {kye}"),
        (f'{COMMAND}ready_pattern = "(up"\n', "harness.a.ready_pattern = '(up': not a valid regular expression: "),
        (
            f'{COMMAND}progress = [{{ pattern = "[", phase = "starting" }}]\n',
            "harness.a.progress[0].pattern = '[': not a valid regular expression: ",
        ),
        (f'{COMMAND}progress = [{{ pattern = "x", phase = "boot" }}]\n', "harness.a.progress[0].phase = 'boot': "),
        (f'{COMMAND}errors = [{{ pattern = "x", cause = "me" }}]\n', "harness.a.errors[0].cause = 'me': "),
        (f'{COMMAND}health_path = "health"\n', "harness.a.health_path = 'health': must be a path that starts with /"),
        (f'{COMMAND}stop_signal = "SIGFOO"\n', "harness.a.stop_signal = 'SIGFOO': "),
        (f'{COMMAND}activity = {{ running = "a b" }}\n', "harness.a.activity.running = 'a b': "),
        (f"{COMMAND}sleep_mode = true\n", 'harness.a: sleep_mode: not with kind = "command" or a preset'),
        ('health_path = "/up"\n', 'harness.a: health_path: only with kind = "command" or a preset'),
        ("", "harness: unknown harness 'a' (known: vllm, sim; for another engine set kind or preset in [harness.a])"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, table: str, problem: str) -> None:
    """With file, key and value, before anything starts."""
    with pytest.raises(SettingsError) as refused:
        loaded(tmp_path, f"[harness.a]\n{table}")
    assert refused.value.problems[0].startswith(f"{tmp_path / 'neuron.toml'}: {problem}")
    assert len(refused.value.problems) == 1


def test_own_harnesses_are_not_redefined(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="harness: vllm: neuron has its own harness of this name"):
        loaded(tmp_path, '[harness.vllm]\npreset = "sglang"\n')


def test_the_environment_describes_an_engine_too(tmp_path: Path) -> None:
    path = tmp_path / "neuron.toml"
    path.touch()
    environ = {**os.environ, "NEURON_HARNESS__LLAMA__PRESET": "llama.cpp"}
    config = load_settings(CheckedConfig, path, env_prefix="NEURON_", environ=environ)
    assert config.harness_names == ["llama"]
