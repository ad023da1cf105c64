"""A wheel built on a host without a C compiler. (`make test-compiled` builds with one.)"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

from neuron.harness.command.preset_files import preset_names

TOP = Path(__file__).parents[2]
LINE = "cortex-neuron: request path not compiled, installing plain Python: no C compiler (absent-cc not found)"


def build(directory: Path, *, compilation: str, terminal: bool = False) -> subprocess.CompletedProcess[str]:
    """`pip wheel` into `directory`, offline. With `terminal` it has one, as for a user at a prompt."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--wheel-dir", str(directory), str(TOP)]
    if terminal:
        command = ["script", "--quiet", "--return", "--command", shlex.join(command), "/dev/null"]
    return subprocess.run(
        command,
        env={**os.environ, "CC": "absent-cc", "CORTEX_COMPILE": compilation, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=50,
    )


def test_without_a_compiler_the_wheel_is_plain_python_and_one_line_says_so(tmp_path: Path) -> None:
    done = build(tmp_path, compilation="auto", terminal=True)
    assert done.returncode == 0, done.stdout
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert [line for line in lines if "compile" in line] == [LINE]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"cortex/models.example.toml", "cortex/proxy/relay.py", "neuron/sim/__main__.py"} <= set(names)
    presets = {name.rpartition("/")[2] for name in names if name.startswith("neuron/harness/command/presets/")}
    assert presets == {f"{preset}.toml" for preset in preset_names()}
    assert not [name for name in names if name.endswith(".so")]


def test_a_build_that_must_be_compiled_fails_without_a_compiler(tmp_path: Path) -> None:
    done = build(tmp_path, compilation="yes")
    assert done.returncode != 0
    assert "no C compiler (absent-cc not found)" in done.stdout
    assert not list(tmp_path.glob("*.whl"))
