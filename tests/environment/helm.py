"""Helm, as the library of a Python package, and the schemas of Kubernetes: in an environment of their own, because the
two take 350 MB."""

from __future__ import annotations

from pathlib import Path

from tests.environment.cache import key_of, prepared
from tests.environment.commands import make_environment

REQUIREMENTS = ("helm-python-sdk==0.2.2", "kubernetes-validate==1.37.0")


def helm_environment() -> Path:
    """Its Python; built on the first call.

    Raises:
        EnvironmentUnavailable: it cannot be built, usually for lack of a network.
    """

    def build(directory: Path) -> None:
        print("installing Helm and the schemas of Kubernetes, once", flush=True)
        make_environment(directory, REQUIREMENTS)

    return prepared(f"helm-{key_of(*REQUIREMENTS)}", build) / "bin" / "python"
