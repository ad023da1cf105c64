"""`python -m tests.environment`: builds what the real-vLLM tests need, before test timeouts apply."""

from __future__ import annotations

import os
import sys

from tests.environment.cache import EnvironmentUnavailable
from tests.environment.models import minilm, tiny_qwen3
from tests.environment.vllm import vllm_environment


def main() -> int:
    """Exit code 1 only in CI, where the tests must not be skipped."""
    try:
        vllm = vllm_environment()
        print(f"vLLM: {vllm.command[0]}")
        print(f"models: {tiny_qwen3(vllm)} {minilm()}")
    except EnvironmentUnavailable as error:
        print(f"vLLM is not available, skipping its tests: {error}", file=sys.stderr)
        return 1 if os.environ.get("CI") == "true" else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
