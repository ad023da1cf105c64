"""`GET /fleet/configuration`: what is in force, what is wrong in the files, and what a reload would change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cortex.config.shown import HIDDEN, without_secrets
from tests.cortex.cli.test_cli import run
from tests.cortex.config.test_reload import OTHER, SMALL, running
from tests.cortex.protocol_v1_neuron import V1Neuron

CONFIGURATION = "/fleet/configuration"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"token": "abc", "token_env": "TOKEN"}, {"token": HIDDEN, "token_env": "TOKEN"}),
        ({"database": None}, {"database": None}),
        ({"endpoint": "http://user:pass@host:1"}, {"endpoint": "http://...@host:1"}),
        (["--hf-token", "abc", "--port", "1"], ["--hf-token", HIDDEN, "--port", "1"]),
        (["--api-key=abc", "-hft", "--odd"], [f"--api-key={HIDDEN}", "-hft", HIDDEN]),
        (["--max-num-batched-tokens", "8192", "--tokenizer=x"], ["--max-num-batched-tokens", "8192", "--tokenizer=x"]),
    ],
)
def test_secrets_are_hidden(value: object, shown: object) -> None:
    assert without_secrets(value) == shown


async def test_what_is_in_force_and_what_a_reload_would_change(benjy: V1Neuron, tmp_path: Path) -> None:
    """Looking applies nothing; a reload applies the files, or refuses them whole."""
    async with running(tmp_path, [benjy], [SMALL]) as cortex:
        cortex.edit_config(lambda data: data["neurons"][0].update(token="hide me"))
        await cortex.reload()
        found = await cortex.get(CONFIGURATION)
        assert "hide me" not in json.dumps(found)
        assert found["neurons"][0]["token"] == HIDDEN
        assert found["models"] == [SMALL]
        assert found["files"] == [str(tmp_path / name) for name in ("cortex.toml", "models.toml")]
        assert (found["errors"], found["reload"]["changes"]) == ([], [])
        log_level = next(setting for setting in found["settings"] if setting["key"] == "log_level")
        assert (log_level["value"], log_level["default"], log_level["needs_restart"]) == ("info", True, True)

        cortex.set_models(SMALL, OTHER, bad="org/none")
        (error,) = (await cortex.get(CONFIGURATION))["errors"]
        assert error["file"] == str(tmp_path / "models.toml")
        assert "org/none" in error["message"]
        told = await run("config", "--check", "--url", cortex.process.url)
        assert told.status == 1
        assert told.out.startswith(f"error: {tmp_path / 'models.toml'}: ")
        refused = await cortex.post(f"{CONFIGURATION}/reload")
        assert refused["error"]["code"] == "configuration_invalid"
        assert "org/none" in refused["error"]["message"]

        cortex.set_models(SMALL, OTHER)
        cortex.edit_config(lambda data: data.update(log_format="json"))
        assert "log_format text -> json" in (await cortex.get(CONFIGURATION))["reload"]["restart"]
        applied = await cortex.post(f"{CONFIGURATION}/reload")
        assert [model["id"] for model in applied["models"]] == ["org/small", "org/other"]
        assert applied["reload"] == {"possible": True, "changes": [], "restart": ["log_format text -> json"]}
