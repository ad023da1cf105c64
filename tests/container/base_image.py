"""A base image made from Debian packages, without an image registry."""

from __future__ import annotations

from pathlib import Path

from tests.container.podman import Podman
from tests.environment.cache import key_of, prepared
from tests.environment.commands import run

BASE_IMAGE = "localhost/cortex-neuron-base"
_SUITE = "bookworm"
_PACKAGES = "python3,python3-venv,ca-certificates"


def import_base_image(podman: Podman, name: str = BASE_IMAGE, packages: str = _PACKAGES) -> None:
    """Imports a Debian with these packages into this Podman's storage, as `name`. The first time takes a minute
    or more and needs a network.

    Raises:
        EnvironmentUnavailable: the image cannot be built.
    """
    archive = prepared(f"base-image-{key_of(_SUITE, packages)}", lambda made: _build(made, packages)) / "root.tar"
    podman("import", archive, name)


def _build(directory: Path, packages: str) -> None:
    root = directory / "root"
    run(["debootstrap", "--variant=minbase", f"--include={packages}", _SUITE, root], timeout=900)
    # The package cache is a third of the image, and the vfs storage driver copies the whole image for each layer.
    run(["find", root / "var/cache/apt", root / "var/lib/apt/lists", "-type", "f", "-delete"], timeout=60)
    run(["tar", "-C", root, "-cf", directory / "root.tar", "."], timeout=300)
    run(["rm", "-rf", "--one-file-system", root], timeout=120)
