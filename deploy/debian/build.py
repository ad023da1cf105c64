"""`python deploy/debian/build.py`: a Debian package each for cortex and neuron, in dist/ (docs/install.md).

Each holds an environment of its own with all dependencies, made for the Python of this Debian: no Debian release has
all of them. It needs dpkg-deb and Debian's own python3 with its venv module, and strip from binutils for packages half
as large.
"""

from __future__ import annotations

import argparse
import compileall
import gzip
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
PYTHON = Path("/usr/bin/python3")
PACKAGES = ("cortex", "neuron")
EXAMPLES = {"cortex": ["deploy/cortex.example.toml", "models.example.toml"], "neuron": ["deploy/neuron.example.toml"]}
EXTRAS = "tokenizers,tracing"  # without pip, users cannot add them later
ROCM = "/opt/rocm/share/amd_smi\n"  # amdsmi must be that of the installed ROCm; a path that does not exist is ignored
DESCRIPTIONS = {
    "cortex": "one OpenAI-compatible address in front of many GPU hosts",
    "neuron": "runs inference engines on the GPUs of this host",
}
CONTROL = """\
Package: {name}
Version: {version}
Architecture: {architecture}
Maintainer: {maintainer}
Installed-Size: {size}
Depends: python3 (>= {python}), python3 (<< {next_python}), libc6, adduser, ca-certificates, procps
Section: net
Priority: optional
Description: {description}
 cortex is the front door of a fleet of GPU hosts: it loads models where they
 fit, and relays requests. neuron runs on each of these hosts.
 .
 This package has its Python packages in /usr/lib/{name}.
"""
COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: cortex-neuron

Files: *
Copyright: 2026 The contributors of cortex-neuron
License: GPL-3+
 On Debian systems the text is in /usr/share/common-licenses/GPL-3.

Files: usr/lib/{name}/lib/*
Copyright: see the licences in the *.dist-info directories
License: see-there
 Each Python package has its own licence.
"""


def main() -> int:
    """Builds both; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=TOP / "dist")
    parser.add_argument("--version", default=_version(), help="the packages' version")
    parser.add_argument("--maintainer", default=_maintainer(), help="default: $DEBFULLNAME <$DEBEMAIL>")
    parser.add_argument("--environment", type=Path, help="made before by this program; default: one made now")
    arguments = parser.parse_args()
    if shutil.which("dpkg-deb") is None or not PYTHON.exists():
        sys.exit("dpkg-deb and Debian's /usr/bin/python3 are needed: build the packages on Debian or Ubuntu")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cortex-deb-") as directory:
        environment = arguments.environment or Path(directory, "environment")
        if not environment.exists():
            make_environment(environment)
        for name in PACKAGES:
            root = Path(directory, name)
            _fill(root, name, environment)
            _describe(root, name, arguments.version, arguments.maintainer)
            _run("dpkg-deb", "--root-owner-group", "-Zzstd", "-z12", "--build", root, arguments.output)
            shutil.rmtree(root)
    return 0


def make_environment(directory: Path) -> None:
    """A virtual environment with this checkout and its dependencies, of Debian's Python. CORTEX_COMPILE says whether
    the request path is compiled (deploy/compile.py)."""
    _run(PYTHON, "-m", "venv", "--without-pip", "--symlinks", directory)
    pip = (sys.executable, "-m", "pip", "--python", directory / "bin/python", "install", "--quiet", "--no-compile")
    _run(*pip, f"{TOP}[{EXTRAS}]")


def _fill(root: Path, name: str, environment: Path) -> None:
    """Every file of the package except those below DEBIAN."""
    home = root / "usr/lib" / name
    packages = Path(*next(environment.glob("lib/python3.*/site-packages")).parts[-3:])
    shutil.copytree(environment / packages, home / packages, ignore=_unneeded)
    for program in ("RECORD", "INSTALLER", "direct_url.json"):  # pip's notes; they name paths of this machine
        for note in (home / packages).glob(f"*.dist-info/{program}"):
            note.unlink()
    libraries = sorted(home.rglob("*.so"))
    if libraries and shutil.which("strip"):
        _run("strip", "--strip-unneeded", *libraries)  # wheels have their compilers' symbols
    (home / packages / "rocm.pth").write_text(ROCM, "utf-8")
    (home / "bin").mkdir()
    (home / "bin/python").symlink_to(os.path.relpath(PYTHON, f"/usr/lib/{name}/bin"))
    (home / "pyvenv.cfg").write_text(
        f"home = {PYTHON.parent}\ninclude-system-site-packages = false\nversion = {_python_version()}\n", "utf-8"
    )
    # Unlike bytecode that is written later, this is removed with the package; it does not depend on the files' times.
    compileall.compile_dir(
        home,
        quiet=2,
        stripdir=str(root),
        prependdir="/",
        workers=os.cpu_count() or 1,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    program = root / "usr/bin" / name
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!/usr/lib/{name}/bin/python -I\nimport sys\n\nfrom {name}.__main__ import main\n\nsys.exit(main())\n",
        "utf-8",
    )
    program.chmod(0o755)
    _copy(TOP / "deploy/systemd" / f"{name}.service", root / "lib/systemd/system" / f"{name}.service")
    for file in sorted((HERE / name / "etc").iterdir()):
        _copy(file, root / "etc" / name / file.name)
    documents = root / "usr/share/doc" / name
    for example in EXAMPLES[name]:
        _copy(TOP / example, documents / "examples" / Path(example).name)
    (documents / "copyright").write_text(COPYRIGHT.format(name=name), "utf-8")
    _copy(HERE / name / "README.Debian", documents / "README.Debian")
    # mtime: the same package from the same checkout.
    (documents / "CHANGELOG.md.gz").write_bytes(gzip.compress((TOP / "CHANGELOG.md").read_bytes(), mtime=0))
    overrides = root / "usr/share/lintian/overrides" / name
    overrides.parent.mkdir(parents=True)
    overrides.write_text((HERE / "lintian-overrides").read_text("utf-8").replace("NAME", name), "utf-8")
    _set_modes(root)


def _describe(root: Path, name: str, version: str, maintainer: str) -> None:
    """DEBIAN: control file, scripts, and which files are configuration."""
    about = root / "DEBIAN"
    about.mkdir(mode=0o755)
    major, minor = _python_version().split(".")[:2]
    size = sum(file.lstat().st_size for file in root.rglob("*") if not file.is_dir()) // 1024
    control = CONTROL.format(
        name=name,
        version=version,
        architecture=_run("dpkg", "--print-architecture").strip(),
        maintainer=maintainer,
        size=size,
        python=f"{major}.{minor}~",
        next_python=f"{major}.{int(minor) + 1}~",
        description=DESCRIPTIONS[name],
    )
    (about / "control").write_text(control, "utf-8")
    files = sorted(file.relative_to(root) for file in (root / "etc").rglob("*") if file.is_file())
    (about / "conffiles").write_text("".join(f"/{file}\n" for file in files), "utf-8")
    for script in ("postinst", "prerm", "postrm"):
        text = (HERE / script).read_text("utf-8").replace("@NAME@", name)
        (about / script).write_text(text, "utf-8")
        (about / script).chmod(0o755)


def _unneeded(directory: str, names: list[str]) -> set[str]:
    """Bytecode, and the tests of other projects."""
    return {name for name in names if name == "__pycache__" or (name == "tests" and "site-packages/" in directory)}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _set_modes(root: Path) -> None:
    """The same whatever this user's umask is. Tokens are for root only."""
    for path in (root, *root.rglob("*")):
        if path.is_symlink():
            continue
        executable = path.is_dir() or path.parent.name == "bin"
        path.chmod(0o755 if executable else 0o600 if path.suffix == ".env" else 0o644)


def _python_version() -> str:
    return _run(PYTHON, "-c", "import platform; print(platform.python_version())").strip()


def _version() -> str:
    """The version in pyproject.toml."""
    lines = (TOP / "pyproject.toml").read_text("utf-8").splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version = "))


def _maintainer() -> str:
    """As for Debian's own tools."""
    name = os.environ.get("DEBFULLNAME", "cortex-neuron maintainers")
    return f"{name} <{os.environ.get('DEBEMAIL', 'maintainers@localhost')}>"


def _run(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
