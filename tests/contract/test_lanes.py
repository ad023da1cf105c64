"""`make test` runs directories of tests side by side: none is left out, and a failure is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lanes import LONGEST, MOST_UNSTEADY, TOGETHER, directories, main


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests here start pytest 15 times, and most of a start is the import of plugins."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def test_every_test_file_is_run_once() -> None:
    files = [file for found in directories(["tests"]).values() for file in found]
    assert sorted(files) == sorted(path.as_posix() for path in Path("tests").rglob("test_*.py"))


def test_named_directories_exist() -> None:
    assert [name for name in (*LONGEST, *TOGETHER) if not Path(name).is_dir()] == []


def test_files_and_directories_can_be_chosen() -> None:
    chosen = directories(["tests/contract/test_lanes.py", "tests/e2e/chaos", "tests/e2e"])
    assert next(iter(chosen)) == "tests/e2e"
    assert chosen["tests/contract"] == ["tests/contract/test_lanes.py"]
    assert "tests/e2e/chaos/test_chaos.py" in chosen["tests/e2e/chaos"]


@pytest.mark.parametrize(("second", "status"), [("pass", 0), ("assert False", 1)])
def test_one_failure_fails_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str], second: str, status: int) -> None:
    """The outputs of both directories are shown, and failures again at the end."""
    for name, body in (("one", "pass"), ("two", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"test_{name}.py").write_text(f"def test_{name}() -> None:\n    {body}\n", "utf-8")
    assert main([str(tmp_path)]) == status
    out = capfd.readouterr().out
    assert all(f"##### {tmp_path}/{name}, " in out for name in ("one", "two"))
    assert (f"{tmp_path}/two failed (1):\nFAILED " in out) == bool(status)
    assert ("assert False" in out) == bool(status)


def _write_test(directory: Path, body: str) -> None:
    directory.mkdir()
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    (directory / "test_one.py").write_text(
        f"from pathlib import Path\n\n\ndef test_one() -> None:\n{indented}", "utf-8"
    )


FIRST_RUN_FAILS = """
runs = Path(__file__).with_name("runs")
runs.write_text(runs.read_text() + "." if runs.exists() else ".")
assert runs.read_text() != "."
"""


def test_a_test_that_passes_alone_is_listed_as_unsteady(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _write_test(tmp_path / "one", FIRST_RUN_FAILS)
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "one" / "runs").read_text() == "." * 4
    assert f"{tmp_path}/one unsteady, passed 3 times alone:\nFAILED " in capfd.readouterr().out


def test_a_test_that_fails_once_alone_fails_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _write_test(tmp_path / "one", FIRST_RUN_FAILS.replace('!= "."', 'not in (".", "...")'))
    assert main([str(tmp_path)]) == 1
    assert (tmp_path / "one" / "runs").read_text() == "..."
    assert f"{tmp_path}/one failed (1):\nFAILED " in capfd.readouterr().out


def test_many_failed_tests_are_not_run_again(tmp_path: Path) -> None:
    for number in range(MOST_UNSTEADY + 1):
        _write_test(tmp_path / str(number), FIRST_RUN_FAILS)
    assert main([str(tmp_path)]) == 1
    assert {file.read_text() for file in tmp_path.rglob("runs")} == {"."}
