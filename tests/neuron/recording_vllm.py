"""A "vllm" that records how it was started and serves like vLLM, for neurons whose GPUs are not simulated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

_CALLS = "calls.jsonl"


class Call(NamedTuple):
    """How an engine was started."""

    arguments: list[str]
    variables: dict[str, str]


def calls(directory: Path) -> list[Call]:
    """The starts of the engines of `vllm_config(directory)`, in order."""
    return [Call(*json.loads(line)) for line in (directory / _CALLS).read_text().splitlines()]


def vllm_config(directory: Path, port_range: tuple[int, int], *lines: str, **keys: Any) -> Path:
    """neuron.toml without `[simulate]`, whose only harness is this "vllm"; `keys` before its tables, `lines` after."""
    program = directory / "vllm"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "if '--version' in sys.argv:\n"
        "    sys.exit('unknown')\n"
        f"with open({str(directory / _CALLS)!r}, 'a') as calls:\n"
        "    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=calls)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'neuron.sim', *sys.argv[1:], '--load-secs', '0'])\n"
    )
    program.chmod(0o755)
    path = directory / "neuron.toml"
    top = {"port": 0, "state_dir": str(directory / "state"), **keys}
    tables = (
        *(f"{key} = {json.dumps(value)}" for key, value in top.items()),
        '[[harnesses]]\nname = "vllm"\n[harness.vllm]',
        f'command = ["{program}"]\nport_range = {list(port_range)}',
    )
    path.write_text("\n".join((*tables, *lines)) + "\n")
    return path
