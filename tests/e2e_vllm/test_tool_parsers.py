"""The parsers that neuron chooses for `tools = true` exist in the installed vLLM."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from neuron.harness.vllm.tools import FAMILIES
from tests.e2e_vllm.conftest import RealVllm

pytestmark = pytest.mark.vllm


def registered(package: Path, table: str) -> set[str]:
    """The keys of the dictionary `table` in the package's __init__.py, read without importing vLLM (ten seconds)."""
    for node in ast.walk(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(keys=keys)) if name == table:
                return {ast.literal_eval(key) for key in keys if key is not None}
    raise AssertionError(f"{package} has no {table}")


def test_every_parser_exists(real_vllm: RealVllm) -> None:
    """Every parser that neuron may choose is registered in the installed vLLM."""
    [package] = Path(real_vllm.command[0]).parents[1].glob("lib/python*/site-packages/vllm")
    tools = registered(package / "tool_parsers", "_TOOL_PARSERS_TO_REGISTER")
    assert {family.tool for family in FAMILIES if family.tool is not None} <= tools
    reasoning = registered(package / "reasoning", "_REASONING_PARSERS_TO_REGISTER")
    assert {family.reasoning for family in FAMILIES if family.reasoning is not None} <= reasoning
