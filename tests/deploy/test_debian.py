"""What the Debian packages contain, built with an environment that has no dependencies."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="this is not Debian")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cortex's."""
    directory = tmp_path_factory.mktemp("debian")
    libraries = directory / "environment/lib/python3.11/site-packages"
    for name in ("cortex", "neuron", "shared"):
        shutil.copytree(TOP / name, libraries / name)
    (libraries / "cortex_neuron-0.1.0.dist-info").mkdir()
    (libraries / "cortex_neuron-0.1.0.dist-info/RECORD").write_text(f"{TOP}/cortex", encoding="utf-8")
    command = [sys.executable, str(TOP / "deploy/debian/build.py"), "--environment", str(directory / "environment")]
    subprocess.run([*command, "--output", str(directory), "--version", "1.0"], check=True, timeout=120)
    return next(directory.glob("cortex_*.deb"))


def test_files(package: Path, tmp_path: Path) -> None:
    """Nothing of the machine that built it; tokens for root only; what a reader looks for in /usr/share/doc."""
    root = tmp_path / "root"
    subprocess.run(["dpkg-deb", "-R", package, root], check=True, timeout=60)
    files = [path for path in root.rglob("*") if not path.is_symlink()]
    assert not [path for path in files if path.stat().st_mode & 0o022]
    assert {path.name for path in files if path.is_file() and not path.stat().st_mode & 0o077} == {"cortex.env"}
    assert not list(root.rglob("RECORD"))
    bytecode = [path.read_bytes() for path in files if path.suffix == ".pyc"]
    assert bytecode
    assert not [code for code in bytecode if b"cortex-deb-" in code]  # the directory in which build.py compiles
    assert (root / "usr/lib/cortex/bin/python").readlink() == Path("../../../bin/python3")
    documents = root / "usr/share/doc/cortex"
    assert gzip.decompress((documents / "CHANGELOG.md.gz").read_bytes()) == (TOP / "CHANGELOG.md").read_bytes()
    assert "GPL-3+" in (documents / "copyright").read_text(encoding="utf-8")
    assert "/etc/cortex/models.toml" in (documents / "README.Debian").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("lintian") is None, reason="lintian is not installed")
def test_lintian(package: Path) -> None:
    """deploy/debian/lintian-overrides gives the reason for each that it allows."""
    command = ["lintian", "--allow-root", "--fail-on", "error,warning", str(package)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
