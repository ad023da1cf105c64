"""`python -m tests.environment`: builds what the tests need besides Python packages, before test timeouts apply."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from tests.environment.cache import EnvironmentUnavailable, MachineUnsuitable
from tests.environment.clients import node_clients, old_python_clients, python_clients
from tests.environment.helm import helm_environment
from tests.environment.infinity import infinity_environment
from tests.environment.llama_cpp import llama_cpp_environment
from tests.environment.models import minilm, tiny_qwen3
from tests.environment.vllm import vllm_environment


def main() -> int:
    """Exit code 1 only in CI, where the tests must not be skipped."""
    complete = [
        _built("real vLLM", _build_vllm),
        _built("llama.cpp", _build_llama_cpp),
        _built("infinity", _build_infinity),
        _built("clients", _build_clients),
        _built("Helm", _build_helm),
    ]
    return 1 if os.environ.get("CI") == "true" and not all(complete) else 0


def _build_vllm() -> None:
    vllm = vllm_environment()
    print(f"vLLM: {vllm.command[0]}")
    print(f"models: {tiny_qwen3(vllm)} {minilm()}")


def _build_llama_cpp() -> None:
    llama_cpp = llama_cpp_environment()
    print(f"llama.cpp: {llama_cpp.server} {llama_cpp.tiny}")


def _build_infinity() -> None:
    infinity = infinity_environment()
    print(f"infinity: {infinity.command[0]} {infinity.reranker}")


def _build_clients() -> None:
    print(f"clients: {python_clients()} {old_python_clients()} {node_clients().directory}")


def _build_helm() -> None:
    print(f"Helm: {helm_environment()}")


def _built(what: str, build: Callable[[], None]) -> bool:
    try:
        build()
    except MachineUnsuitable as error:
        print(f"{what} does not run here, skipping the tests: {error}", file=sys.stderr)
    except EnvironmentUnavailable as error:
        print(f"{what} not available, skipping the tests: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
