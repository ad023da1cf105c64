"""An infinity that runs on the CPU, in a virtual environment of its own, and a tiny reranker for it.

It needs a CPU build of torch; see vllm.py.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.environment import tiny_reranker
from tests.environment.cache import key_of, prepared
from tests.environment.commands import make_environment, run

_REQUIREMENTS = ("infinity-emb[torch,server]==0.0.78", "torch==2.13.0")


@dataclass(frozen=True)
class InfinityEnvironment:
    """A virtual environment with infinity, and the directory of a random BERT cross-encoder."""

    python: Path
    reranker: Path

    @property
    def command(self) -> list[str]:
        """The `infinity_emb` command."""
        return [str(self.python.with_name("infinity_emb"))]


def infinity_environment() -> InfinityEnvironment:
    """The environment, built on the first call: about a minute, a download of 0.4 GB, 1.3 GB on disk.

    Raises:
        EnvironmentUnavailable: it cannot be built, usually for lack of a network or a matching torch.
    """
    interpreter = f"{sys.version_info.major}.{sys.version_info.minor}-{platform.machine()}"
    script = Path(tiny_reranker.__file__)

    def build(directory: Path) -> None:
        print("installing infinity, once", flush=True)
        python = make_environment(directory, _REQUIREMENTS)
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        run([python, script, directory / "reranker"], timeout=300, env=offline)
        run([python.with_name("infinity_emb"), "--help"], timeout=300)  # writes bytecode: it starts sooner

    directory = prepared(f"infinity-{key_of(*_REQUIREMENTS, script.read_bytes(), interpreter)}", build)
    return InfinityEnvironment(directory / "bin" / "python", directory / "reranker")
