"""`python -m tests.environment`: builds what tests with real vLLM and clients need, before test timeouts apply."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from tests.environment.cache import EnvironmentUnavailable
from tests.environment.clients import node_clients, python_clients
from tests.environment.models import minilm, tiny_qwen3
from tests.environment.vllm import vllm_environment


def main() -> int:
    """Exit code 1 only in CI, where no test must be skipped."""
    missing = [what for what, build in _PARTS.items() if not _built(what, build)]
    return 1 if missing and os.environ.get("CI") == "true" else 0


def _vllm() -> str:
    vllm = vllm_environment()
    return f"{vllm.command[0]}, models: {tiny_qwen3(vllm)} {minilm()}"


_PARTS: dict[str, Callable[[], object]] = {
    "real vLLM": _vllm,
    "clients from PyPI": python_clients,
    "clients from npm": node_clients,
}


def _built(what: str, build: Callable[[], object]) -> bool:
    try:
        print(f"{what}: {build()}")
    except EnvironmentUnavailable as error:
        print(f"no {what} here, skipping its tests: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
