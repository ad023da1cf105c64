"""A base image made from Debian packages, without an image registry."""

from __future__ import annotations

from pathlib import Path

from tests.container.podman import Podman
from tests.environment.cache import key_of, prepared
from tests.environment.commands import run

BASE_IMAGE = "localhost/cortex-neuron-base"
_SUITE = "bookworm"
_PACKAGES = "python3,python3-venv,ca-certificates"


def import_base_image(podman: Podman) -> None:
    """Imports the base image into this Podman's storage. The first time takes half a minute and needs a network.

    Raises:
        EnvironmentUnavailable: the image cannot be built.
    """
    archive = prepared(f"base-image-{key_of(_SUITE, _PACKAGES)}", _build) / "root.tar"
    podman("import", archive, BASE_IMAGE)


def _build(directory: Path) -> None:
    root = directory / "root"
    run(["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, root], timeout=900)
    # The package cache is a third of the image, and the vfs storage driver copies the whole image for each layer.
    run(["find", root / "var/cache/apt", root / "var/lib/apt/lists", "-type", "f", "-delete"], timeout=60)
    run(["tar", "-C", root, "-cf", directory / "root.tar", "."], timeout=300)
    run(["rm", "-rf", "--one-file-system", root], timeout=120)
