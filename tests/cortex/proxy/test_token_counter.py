"""A prompt is counted by the model's own tokenizer, in a process of its own that delays no other request."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from cortex.proxy.prompt import counting_process, token_counter
from cortex.proxy.prompt.counting_process import CountRequest, count_tokens
from cortex.proxy.prompt.local_tokenizer import LocalTokenizer, local_tokenizer
from cortex.proxy.prompt.prompt_size import PromptSize
from cortex.proxy.prompt.token_counter import TokenCounter
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron

SAMPLE = ["the quick brown fox jumps over the lazy dog", "then they thought of other things", "12 34 naïve"] * 9
CONTEXT = 100
MODEL = "org/m"


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE that begins each prompt with a special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SAMPLE,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<begin>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 0)])
    return tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> LocalTokenizer:
    return found_in(directory)


@pytest.fixture
async def counter() -> AsyncIterator[TokenCounter]:
    counter = TokenCounter()
    yield counter
    await counter.close()
    assert not counting_processes()


def found_in(directory: Path) -> LocalTokenizer:
    found = local_tokenizer(str(directory), {})
    assert found is not None
    return found


def counting_processes(pid: int | None = None) -> list[psutil.Process]:
    """Those that a cortex, or the test's own process, has started and that are alive."""
    found = []
    for child in psutil.Process(pid).children():
        try:
            if counting_process.__name__ in child.cmdline():
                found.append(child)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


TEXTS = st.one_of(st.text(max_size=300), st.lists(st.sampled_from([*SAMPLE, " ", "\n", "th"])).map("".join))
PIECES = st.sampled_from([7, 50, 1 << 18])


@settings(max_examples=150, deadline=None)
@given(TEXTS, PIECES, st.integers(0, 150), st.booleans())
def test_a_completion_is_refused_if_and_only_if_it_exceeds_the_context(
    tokenizer: LocalTokenizer, text: str, piece: int, context: int, special: bool
) -> None:
    """Also one that is counted piece by piece."""
    whole = len(Tokenizer.from_file(tokenizer.path).encode(text, add_special_tokens=special))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting_process, "PIECE_CHARS", piece)
        found = count_tokens(CountRequest(tokenizer, text, 0, special, context))
    assert found.tokens <= whole
    assert (found.tokens > context) == (whole > context)
    assert found.at_least or found.tokens == whole


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, TEXTS, PIECES)
def test_a_chat_has_no_fewer_tokens_whatever_its_template_puts_around_it(
    tokenizer: LocalTokenizer, before: str, text: str, after: str, piece: int
) -> None:
    whole = len(Tokenizer.from_file(tokenizer.path).encode(before + text + after, add_special_tokens=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting_process, "PIECE_CHARS", piece)
        found = count_tokens(CountRequest(tokenizer, text, 2, False, CONTEXT))
    assert found.at_least
    assert found.tokens <= whole


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, 3),
        ({"add_bos_token": False}, 2),
        ({"add_bos_token": True, "add_eos_token": None}, 3),
        ({"added_tokens_decoder": {"500": {"content": "thethe"}}}, 2),
        ({"eos_token": "thethe"}, 2),
    ],
)
def test_what_tokenizer_config_says_counts(config: dict[str, Any], tokens: int, tmp_path: Path) -> None:
    """It may switch special tokens off, and name tokens that tokenizer.json lacks."""
    made = make_tokenizer()
    made.enable_truncation(1)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = count_tokens(CountRequest(found_in(tmp_path), "thethe", 0, True, CONTEXT))
    assert (found.tokens, found.at_least) == (tokens, False)


def prompt_of(tokens: int) -> str:
    """So many tokens: no merge has this character."""
    return "\x01" * tokens


async def ask(cortex: RunningCortex, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    async with cortex.http.post(f"{cortex.url}/v1/{path}", json={"model": MODEL, **body}) as answer:
        return answer.status, json.loads(await answer.read())


async def test_a_prompt_that_cannot_fit_costs_no_load(
    start_cortex: StartCortex, benjy: V1Neuron, directory: Path
) -> None:
    """A completion's tokens are exact, with the special one; a chat has at least those of its text."""
    cortex = await start_cortex([benjy], [{"id": MODEL, "source": str(directory), "max_model_len": CONTEXT}])
    for path, body, contains in (
        ("completions", {"prompt": prompt_of(CONTEXT + 1)}, "contains 102 input tokens"),
        ("completions", {"prompt": prompt_of(CONTEXT)}, "contains at least 101 input tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": prompt_of(150)}]}, "contains at least 134 "),
    ):
        status, answer = await ask(cortex, path, body)
        assert (status, answer["error"]["type"], answer["error"]["param"]) == (
            400,
            "BadRequestError",
            "input_tokens",
        )
        assert contains in answer["error"]["message"]
    assert not benjy.loads
    assert (await ask(cortex, "completions", {"prompt": prompt_of(CONTEXT - 1)}))[0] == 200
    assert len(benjy.loads) == 1


async def test_only_a_text_that_might_exceed_the_context_is_counted(
    start_cortex: StartCortex, benjy: V1Neuron, directory: Path
) -> None:
    cortex = await start_cortex([benjy], [{"id": MODEL, "source": str(directory), "max_model_len": CONTEXT}])
    assert (await ask(cortex, "completions", {"prompt": prompt_of(CONTEXT - 1)}))[0] == 200
    assert not counting_processes()


async def test_while_it_counts_other_requests_are_served(
    start_cortex: StartCortex, benjy: V1Neuron, directory: Path
) -> None:
    cold = {"id": MODEL, "source": str(directory), "max_model_len": CONTEXT}
    benjy.models["org/other"] = "loaded"
    cortex = await start_cortex([benjy], [cold, {"id": "org/other"}])
    too_long = {"prompt": prompt_of(CONTEXT + 1)}
    assert (await ask(cortex, "completions", too_long))[0] == 400
    (process,) = counting_processes()
    process.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(ask(cortex, "completions", too_long))
    async with cortex.chat("org/other") as answer:
        assert answer.status == 200
    assert not waiting.done()
    process.send_signal(signal.SIGCONT)
    assert (await waiting)[0] == 400


async def test_a_cancelled_count_ends(counter: TokenCounter, tokenizer: LocalTokenizer) -> None:
    """Its process is killed, and the next count starts another."""
    size = PromptSize(text="the")
    assert (await counter.counted(size, tokenizer, CONTEXT)).tokens == 1
    (process,) = counting_processes()
    process.send_signal(signal.SIGSTOP)
    waiting = asyncio.create_task(counter.counted(size, tokenizer, CONTEXT))
    following = asyncio.create_task(counter.counted(size, tokenizer, CONTEXT))
    while not counter._turn.locked():  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (await following).tokens == 1
    assert process not in counting_processes()


async def test_process_that_has_ended_is_replaced(counter: TokenCounter, tokenizer: LocalTokenizer) -> None:
    size = PromptSize(text="the")
    for _ in range(2):
        assert (await counter.counted(size, tokenizer, CONTEXT)).tokens == 1
        (process,) = counting_processes()
        os.kill(process.pid, signal.SIGKILL)


async def test_process_that_has_ended_is_replaced_on_uvloop(tmp_path: Path, benjy: V1Neuron, directory: Path) -> None:
    """Its loop has other errors than asyncio's for a pipe to a process that has ended."""
    model = {"id": MODEL, "source": str(directory), "max_model_len": CONTEXT}
    async with cortex_process(tmp_path, [benjy], [model]) as cortex, aiohttp.ClientSession() as http:
        for _ in range(3):
            body = {"model": MODEL, "prompt": prompt_of(CONTEXT + 1)}
            async with http.post(f"{cortex.url}/v1/completions", json=body) as answer:
                assert answer.status == 400
            (process,) = counting_processes(cortex.process.pid)
            process.kill()
            while psutil.pid_exists(process.pid):  # noqa: ASYNC110 - until cortex has noticed
                await asyncio.sleep(0.01)


async def test_process_that_ends_while_it_counts_is_started_again_later(
    counter: TokenCounter, tokenizer: LocalTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Told once until then."""
    size = PromptSize(text="the")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", shutil.which("false"))
        for _ in range(2):
            assert await counter.counted(size, tokenizer, CONTEXT) == size
    assert [record.name for record in caplog.records].count(token_counter.__name__) == 1  # asyncio may warn too
    assert await counter.counted(size, tokenizer, CONTEXT) == size
    later = monotonic() + token_counter.RETRY_SECS
    monkeypatch.setattr(token_counter, "monotonic", lambda: later)
    assert (await counter.counted(size, tokenizer, CONTEXT)).tokens == 1


async def test_without_the_package_nothing_is_counted(
    counter: TokenCounter, tokenizer: LocalTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    size = PromptSize(text="the")
    assert await counter.counted(size, tokenizer, CONTEXT) == size
    assert not counting_processes()


async def test_broken_tokenizer_is_told_once(
    counter: TokenCounter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Until it is mended."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}), encoding="utf-8")
    size, broken = PromptSize(text="the"), found_in(tmp_path)
    for _ in range(2):
        assert await counter.counted(size, broken, CONTEXT) == size
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"cannot count tokens with {path}, only characters"
    ]
    make_tokenizer().save(str(path))
    assert (await counter.counted(size, found_in(tmp_path), CONTEXT)).tokens == 1
