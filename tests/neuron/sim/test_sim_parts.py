"""The simulated engine's parts without a process: arguments, tokens, slots, shares."""

from __future__ import annotations

import asyncio

import pytest

from neuron.sim.engine import tokens
from neuron.sim.engine.arguments import human_readable_int_or_auto, parse
from neuron.sim.engine.faults import Fault
from neuron.sim.engine.memory import split_evenly
from neuron.sim.engine.slots import Slots
from neuron.sim.engine.vectors import similarity


def test_vllms_arguments_are_accepted() -> None:
    """The simulation accepts neuron's command line and arguments that a catalogue may add."""
    line = (
        "serve Qwen/Qwen3-8B --host 127.0.0.2 --port 9 --served-model-name a b --tensor-parallel-size 2"
        " --quantization fp8 --gpu-memory-utilization 0.9 --max-model-len 32k --max-num-seqs 4 --enforce-eager"
        " --dtype bfloat16 --enable-auto-tool-choice --tool-call-parser hermes --fault hang --fault bad-health"
    )
    settings = parse(line.split())
    assert (settings.model, settings.host, settings.port) == ("Qwen/Qwen3-8B", "127.0.0.2", 9)
    assert (settings.served_names, settings.name) == (("a", "b"), "a")
    assert (settings.tensor_parallel, settings.vram_mb) == (2, 2048)
    assert (settings.max_model_len, settings.max_num_seqs) == (32000, 4)
    assert settings.faults.active == {Fault.HANG, Fault.BAD_HEALTH}


@pytest.mark.parametrize(("text", "value"), [("512", 512), ("1k", 1000), ("1K", 1024), ("1.5m", 1500000)])
def test_token_numbers_are_read_as_vllm_reads_them(text: str, value: int) -> None:
    assert human_readable_int_or_auto(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "banana", "1kk"])
def test_other_token_numbers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        human_readable_int_or_auto(text)


@pytest.mark.parametrize("text", ["", " ", "one two", "  a\t\nlong-word  ", "日本語 text", "🎉🎉", "a\x00b"])
def test_tokens_and_ids_round_trip(text: str) -> None:
    assert "".join(tokens.pieces(text)) == text
    assert tokens.text_of(tokens.token_ids(text)) == text
    assert tokens.count(text) == len(tokens.token_ids(text)) == len(tokens.pieces(text))
    assert all(0 < number < 2**41 for number in tokens.token_ids(text))


def test_shares_add_up() -> None:
    """The remainder goes to the first shares, so nothing is lost."""
    assert split_evenly(10, 3) == [4, 3, 3]


def test_shared_words_make_texts_similar() -> None:
    same, near, far = (similarity("red cats sleep", other, 64) for other in ("Red cats sleep", "red dogs sleep", "tax"))
    assert same == pytest.approx(1)
    assert same > near > far


async def test_slots_are_granted_in_order_and_within_the_limit() -> None:
    slots = Slots(2)
    order: list[str] = []
    leave = {name: asyncio.Event() for name in "abcd"}

    async def hold(name: str, needed: int) -> None:
        async with slots.take(needed):
            order.append(name)
            assert slots.running <= 2
            await leave[name].wait()

    holders = [asyncio.create_task(hold(name, needed)) for name, needed in (("a", 1), ("b", 2), ("c", 1), ("d", 1))]
    await asyncio.sleep(0)
    assert (order, slots.running, slots.waiting) == (["a"], 1, 4)
    holders[1].cancel()  # b is first and needs both: the others no longer have to wait
    await asyncio.wait([holders[1]])
    await asyncio.sleep(0)
    assert (order, slots.running, slots.waiting) == (["a", "c"], 2, 1)
    for event in leave.values():
        event.set()
    await asyncio.wait(holders)
    assert (order, slots.running, slots.waiting) == (["a", "c", "d"], 0, 0)


async def test_a_request_larger_than_the_limit_runs_alone() -> None:
    slots = Slots(2)
    async with slots.take(5):
        assert slots.running == 5
    assert slots.running == 0


async def test_a_slot_granted_during_a_cancellation_is_not_lost() -> None:
    slots = Slots(1)

    async def hold() -> None:
        async with slots.take(1):
            await asyncio.sleep(0)

    async with slots.take(1):
        waiter = asyncio.create_task(hold())
        await asyncio.sleep(0)
    waiter.cancel()  # its slot is granted, but it has not run since
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert (slots.running, slots.waiting) == (0, 0)
