"""The installed vLLM's own parser reads the flags that neuron makes from `parallel`, and neuron refuses every way in
which it would read them from a model's arguments."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from neuron.harness.vllm.command import parallel_arguments
from neuron.spec import EngineSpec
from shared.protocol.reserved_arguments import PARALLEL_FLAGS, refused_argument
from tests.e2e_vllm.conftest import RealVllm

pytestmark = pytest.mark.vllm

SPLITS: list[dict[str, Any]] = [
    {"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 2},
    {"pipeline_parallel": 3},
    {"data_parallel": 4, "expert_parallel": True},
    {},
]
NAMES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel")
_SCRIPT = """
import contextlib, json, sys
from vllm.utils.argparse_utils import FlexibleArgumentParser
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
parser = make_arg_parser(FlexibleArgumentParser())
asked = json.load(sys.stdin)
def parsed(argv):
    try:
        return {name: value for name, value in vars(parser.parse_args(argv)).items() if name in asked["names"]}
    except SystemExit:
        return None
with contextlib.redirect_stdout(sys.stderr):
    found = {"options": sorted(parser._option_string_actions), "parsed": [parsed(argv) for argv in asked["argvs"]]}
print("RESULT" + json.dumps(found, default=str))
"""


def ask(vllm: RealVllm, argvs: list[list[str]], names: tuple[str, ...]) -> dict[str, Any]:
    """What the parser makes of each command line (None: refused), and all of its options. Takes ten seconds."""
    done = subprocess.run(
        [str(Path(vllm.command[0]).parent / "python"), "-c", _SCRIPT],
        input=json.dumps({"argvs": argvs, "names": names}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT")[2])
    return found


def abbreviations() -> list[str]:
    """Every beginning of every flag and its short form, and of the `--no-` forms."""
    flags = [*PARALLEL_FLAGS, *PARALLEL_FLAGS.values(), *(f"--no-{flag[2:]}" for flag in PARALLEL_FLAGS)]
    return sorted({flag[:end] for flag in flags for end in range(2 + flag.startswith("--"), len(flag) + 1)})


def test_the_parser_agrees(real_vllm: RealVllm) -> None:
    """The made flags mean what `parallel` says. Whatever the parser reads as one of them, abbreviated or with its value
    in the same word, is refused; its other flags are not."""
    specs = [EngineSpec("m", "vllm", "m", **split) for split in SPLITS]
    words = abbreviations()
    tried = [*([word] for word in words), *([word, "2"] for word in words), *([f"{word}=2"] for word in words)]
    tried += [["-n2"], ["-r1"], ["--data_parallel_size", "2"], ["--pipeline_parallel_size=2"]]
    fields = tuple({flag.removeprefix("--").replace("-", "_") for flag in PARALLEL_FLAGS})
    found = ask(real_vllm, [*map(parallel_arguments, specs), *tried], fields)
    for spec, parsed in zip(specs, found["parsed"], strict=False):
        sizes = (spec.tensor_parallel, spec.pipeline_parallel, spec.data_parallel, spec.expert_parallel)
        assert tuple(parsed[name] for name in NAMES) == sizes
    default = found["parsed"][SPLITS.index({})]
    results = zip(tried, found["parsed"][len(specs) :], strict=True)
    read = [argv for argv, parsed in results if parsed is not None and parsed != default]
    assert all(argv in read for argv in (["-dp", "2"], ["-n2"], ["--pipe", "2"], ["--enable-exp"], ["-e"]))
    assert [argv for argv in read if refused_argument(argv) is None] == []
    others = [flag for flag in found["options"] if refused_argument([flag]) is None]
    assert set(PARALLEL_FLAGS) <= set(found["options"])
    assert not {*PARALLEL_FLAGS, *PARALLEL_FLAGS.values()} & {*others}
    assert {"--max-model-len", "--decode-context-parallel-size", "-dcp", "-q", "--enable-prefix-caching"} <= {*others}
