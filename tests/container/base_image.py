"""A base image made from Debian's own packages: no image registry is needed."""

from __future__ import annotations

from pathlib import Path

from tests.container.podman import Podman
from tests.environment.cache import key_of, prepared
from tests.environment.commands import run

BASE_IMAGE = "localhost/cortex-neuron-base"
_SUITE = "bookworm"
_PACKAGES = "python3,python3-venv,ca-certificates"


def import_base_image(podman: Podman) -> None:
    """Puts the base image into this Podman's storage. The first time it takes half a minute and a network.

    Raises:
        EnvironmentUnavailable: it cannot be made.
    """
    archive = prepared(f"base-image-{key_of(_SUITE, _PACKAGES)}", _build) / "root.tar"
    podman("import", archive, BASE_IMAGE)


def _build(directory: Path) -> None:
    root = directory / "root"
    run(["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, root], timeout=900)
    # The package cache is a third of it, and every layer copies the whole of it in the simplest storage driver.
    run(["find", root / "var/cache/apt", root / "var/lib/apt/lists", "-type", "f", "-delete"], timeout=60)
    run(["tar", "-C", root, "-cf", directory / "root.tar", "."], timeout=300)
    run(["rm", "-rf", "--one-file-system", root], timeout=120)
