"""What cortex keeps over restarts, and where."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import time
from pathlib import Path

import pytest

from cortex.config.files import state_directory
from cortex.config.settings import CortexConfig
from cortex.fleet.store import STORED_IDS, StateFile
from cortex.routing.replica import ANY_NODE
from cortex.routing.response_owners import ResponseMaker
from tests.cortex.fleets import replica


async def test_the_state_survives_a_restart(tmp_path: Path) -> None:
    """Drained neurons and times of loads; in a file that is this user's alone, with nothing beside it but a lock."""
    state = StateFile(tmp_path / "cortex" / "state")
    state.set_drained("beast", True)
    state.set_drained("benjy", True)
    state.set_drained("benjy", False)
    state.set_load_secs("org/small", "beast", 12.5)
    state.set_max_model_len("org/small", 40960)
    await state.close()
    directory = tmp_path / "cortex" / "state"
    assert stat.S_IMODE((directory / "state.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert sorted(path.name for path in directory.iterdir()) == ["lock", "state.json"]
    again = StateFile(directory)
    assert again.drained == {"beast"}
    assert again.load_secs == {"org/small": {"beast": 12.5}}
    assert again.max_model_len == {"org/small": 40960}


async def test_models_held_back_survive_a_restart(tmp_path: Path) -> None:
    """Until their time is over or an operator loads them."""
    state, now = StateFile(tmp_path), time.time()
    for key in (("a", "beast"), ("a", "benjy"), ("b", ANY_NODE), ("c", ANY_NODE)):
        state.hold_back(key, now + 3600)
    state.hold_back(("d", ANY_NODE), now - 1)
    assert state.end_holds("a", "benjy")
    assert state.end_holds("c", "beast")
    assert not state.end_holds("e", None)
    await state.close()
    again = StateFile(tmp_path)
    assert again.holds == {("a", "beast"): now + 3600, ("b", ANY_NODE): now + 3600}
    assert again.end_holds("a", None)
    assert list(again.holds) == [("b", ANY_NODE)]


async def test_a_restart_forgives_no_key(tmp_path: Path) -> None:
    """Device time fades while cortex is down, as it does while it runs."""
    state = StateFile(tmp_path)
    state.set_device_time({"key": 100.0})
    await state.close()
    assert StateFile(tmp_path).device_time(1e9) == pytest.approx({"key": 100.0})
    assert StateFile(tmp_path).device_time(0) == {"key": 0.0}
    path = tmp_path / "state.json"
    stored = json.loads(path.read_text())
    stored["device_time"]["as_of"] -= 3600
    path.write_text(json.dumps(stored))
    assert StateFile(tmp_path).device_time(1800) == pytest.approx({"key": 25.0}, rel=0.01)


async def test_makers_of_responses_survive_a_restart(tmp_path: Path) -> None:
    """The newest of them. Their URLs and keys may have changed, and keys do not belong into the file."""
    state = StateFile(tmp_path)
    for number in range(STORED_IDS + 1):
        made = replica("org/small", "beast", "http://e", api_key="secret", others=number % 3)
        state.add_response(f"resp_{number}", ResponseMaker(made, "key"))
    await state.close()
    assert "secret" not in (tmp_path / "state.json").read_text(encoding="utf-8")
    owners = StateFile(tmp_path).response_owners
    assert owners.find("resp_0") is None
    assert owners.find(f"resp_{STORED_IDS}") == ResponseMaker(replica("org/small", "beast", ""), "key")
    assert len(owners.listed().makers) == 1


async def test_adapter_and_key_of_a_response_survive_a_restart(tmp_path: Path) -> None:
    """One engine makes responses as its base and as its adapters, and for several API keys and clients without one."""
    state = StateFile(tmp_path)
    makers = [(adapter, key_id) for adapter in (None, "a", "b") for key_id in ("", "key1", "key2")]
    for adapter, key_id in makers:
        engine = replica("org/small", "beast", "http://e", adapter=adapter)
        state.add_response(f"resp_{adapter}_{key_id}", ResponseMaker(engine, key_id))
    await state.close()
    owners = StateFile(tmp_path).response_owners
    for adapter, key_id in makers:
        engine = replica("org/small", "beast", "", adapter=adapter)
        assert owners.find(f"resp_{adapter}_{key_id}") == ResponseMaker(engine, key_id)


def test_no_key_is_known_from_a_file_of_an_earlier_version(tmp_path: Path) -> None:
    responses = {"engines": [["m", "n"]], "made": {"resp_1": 0}}
    (tmp_path / "state.json").write_text(json.dumps({"version": 1, "responses": responses}), encoding="utf-8")
    maker = StateFile(tmp_path).response_owners.find("resp_1")
    assert maker is not None
    assert maker.key_id is None


def test_makers_that_do_not_exist_are_left_out(tmp_path: Path) -> None:
    """The file was edited."""
    responses = {"engines": [["m", "n"]], "made": {"resp_1": 0, "resp_2": 1, "resp_3": -1}}
    (tmp_path / "state.json").write_text(json.dumps({"version": 1, "responses": responses}), encoding="utf-8")
    assert StateFile(tmp_path).response_owners.listed().responses == {"resp_1": 0}


async def test_flush_returns_when_a_drain_is_on_disk(tmp_path: Path) -> None:
    """The drain is kept even if the process is killed right after."""
    state = StateFile(tmp_path)
    state.set_drained("beast", True)
    await state.flush()
    assert StateFile(tmp_path).drained == {"beast"}


async def test_no_file_is_created_without_state(tmp_path: Path) -> None:
    """A cortex that drained no neuron writes no file."""
    state = StateFile(tmp_path / "state")
    await state.flush()
    await state.close()
    assert not (tmp_path / "state").exists()


async def test_many_changes_are_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop waits a moment, then writes once."""
    monkeypatch.setattr("cortex.fleet.store.WRITE_AFTER_SECS", 0.05)
    state = StateFile(tmp_path)
    written: list[bytes] = []
    write = state._write

    def noted(directory: Path, data: bytes) -> str | None:
        written.append(data)
        return write(directory, data)

    monkeypatch.setattr(state, "_write", noted)
    loop = asyncio.create_task(state.write_loop())
    for number in range(100):
        state.set_load_secs("m", "n", number)
    while not written:  # noqa: ASYNC110 - written in a thread
        await asyncio.sleep(0.01)
    loop.cancel()
    await state.close()
    assert len(written) == 1
    assert StateFile(tmp_path).load_secs == {"m": {"n": 99}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 2, "drained": []}',
        '{"drained": ["beast"]}',
        '{"version": 1, "drained": "beast"}',
        '{"version": 1, "load_secs": {"m": {"n": -1}}}',
        '{"version": 1, "load_secs": {"m": {"n": NaN}}}',
        b"\xff\xfe\x00",
    ],
)
async def test_an_invalid_file_is_renamed(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | bytes) -> None:
    """It is warned of, cortex starts without it, and the next write does not destroy it."""
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "state.json").write_bytes(data)
    state = StateFile(tmp_path)
    assert (set(state.drained), dict(state.load_secs)) == (set(), {})
    assert f"{tmp_path}/state.json is invalid and was renamed to state.json.bad" in caplog.text
    state.set_drained("beast", True)
    await state.close()
    assert (tmp_path / "state.json.bad").read_bytes() == data
    assert StateFile(tmp_path).drained == {"beast"}


def test_an_invalid_file_that_cannot_be_renamed_is_not_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state.json").write_bytes(b"{")
    (tmp_path / "state.json.bad").mkdir()
    StateFile(tmp_path)
    assert f"{tmp_path}/state.json is invalid and cannot be renamed (Is a directory)" in caplog.text


def test_a_directory_that_is_a_file_has_no_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing there is invalid; the command line warns that no state can be kept."""
    (tmp_path / "state").touch()
    assert StateFile(tmp_path / "state").drained == set()
    assert caplog.text == ""


async def test_unknown_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    """Known fields keep their meaning as long as the file's version is the same."""
    (tmp_path / "state.json").write_text(json.dumps({"version": 1, "drained": ["a"], "more": 1}), encoding="utf-8")
    assert StateFile(tmp_path).drained == {"a"}


async def test_an_unwritable_directory_causes_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each change tries again; once writing works, everything is saved."""
    caplog.set_level(logging.INFO)
    place = tmp_path / "file"
    place.write_text("in the way", encoding="utf-8")
    state = StateFile(place / "state")
    for name in ("a", "b"):
        state.set_drained(name, True)
        await state.flush()
    assert state.problem is not None
    assert "Not a directory" in state.problem
    assert caplog.text.count("are lost when this process ends") == 1
    place.unlink()
    await state.flush()
    assert state.problem is None
    assert "can be written again" in caplog.text
    await state.close()
    assert StateFile(place / "state").drained == {"a", "b"}


async def test_one_cortex_writes_at_a_time(tmp_path: Path) -> None:
    """A second one reads, as it may be the next that starts while the first still drains, and writes when that is gone;
    until then neither undoes the other's changes."""
    first = StateFile(tmp_path)
    first.set_drained("a", True)
    await first.flush()
    second = StateFile(tmp_path)
    second.set_drained("b", True)
    await second.flush()
    assert second.problem is not None
    assert second.problem == "in use by another cortex, which counts limits for itself"
    assert StateFile(tmp_path).drained == {"a"}
    await first.close()
    await second.flush()
    assert second.problem is None
    assert StateFile(tmp_path).drained == {"a", "b"}
    await second.close()


async def test_what_is_closed_takes_the_lock_no_more(tmp_path: Path) -> None:
    """A thread that still writes the timeline would keep the next cortex out until this process ends."""
    first, second = StateFile(tmp_path), StateFile(tmp_path)
    first.acquire_lock()
    await first.close()
    with pytest.raises(OSError, match="this cortex has stopped writing there"):
        first.acquire_lock()
    second.acquire_lock()
    await second.close()


async def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file replaces the old one whole or not at all."""
    state = StateFile(tmp_path)
    state.set_drained("a", True)
    await state.flush()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    state.set_drained("b", True)
    await state.flush()
    assert state.problem == "No space left on device"
    assert StateFile(tmp_path).drained == {"a"}
    monkeypatch.undo()
    await state.close()


async def test_without_a_directory_the_state_stays_in_memory() -> None:
    """A development fleet's state ends with its cortex."""
    state = StateFile(None)
    state.set_drained("beast", True)
    await state.flush()
    assert (set(state.drained), state.problem) == ({"beast"}, None)
    await state.close()


def test_the_state_directory(tmp_path: Path) -> None:
    """It is the configured one, else systemd's, else one in the user's home that depends on the configuration file's
    path, so that two cortexes share nothing."""
    files = [tmp_path / name / "cortex.toml" for name in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text("", encoding="utf-8")
    config, at_home = CortexConfig(), {"XDG_STATE_HOME": "/home/x/state"}
    given = CortexConfig.model_validate({"state_dir": "kept"})
    assert state_directory(given, files[0], {"STATE_DIRECTORY": "/var/lib/cortex"}) == files[0].parent / "kept"
    assert state_directory(config, files[0], {"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}) == Path("/var/lib/a")
    a, b = (state_directory(config, file, at_home) for file in files)
    assert a is not None
    assert a.parent == Path("/home/x/state/cortex")
    assert a != b
    (tmp_path / "link.toml").symlink_to(files[0])
    assert state_directory(config, tmp_path / "link.toml", at_home) == a


def test_a_configuration_that_is_not_on_disk_keeps_no_state(tmp_path: Path) -> None:
    """`cortex dev` passes its configuration in memory, by a descriptor whose number another cortex may get next time. A
    configured `state_dir` is used."""
    fd = os.memfd_create("cortex.toml", 0)
    try:
        path = Path(f"/dev/fd/{fd}")
        assert state_directory(CortexConfig(), path, {"STATE_DIRECTORY": "/var/lib/cortex"}) is None
        given = CortexConfig.model_validate({"state_dir": str(tmp_path)})
        assert state_directory(given, path, {}) == tmp_path
    finally:
        os.close(fd)
