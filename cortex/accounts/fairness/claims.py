"""What callers deserve in comparison with each other. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from cortex.accounts.caller import Caller
from cortex.accounts.fairness.turns import Level, level_of

CLEARLY = 1.5
"""Callers whose device time differs by less than this factor have used about the same: swaps for the sake of small
differences would cost all of them more than they gain."""


class Claim(NamedTuple):
    """What a caller deserves: the lower the `level` (`level_of`), then `used`, the more. `used` are device-seconds
    divided by its weight (`DeviceTime.accounts`)."""

    level: Level
    used: float
    caller: Caller | None


def claim_of(callers: Collection[Caller], accounts: Mapping[str, float]) -> Claim:
    """The claim of the most deserving of these callers; without any that of one that has used nothing."""
    claims = [Claim(level_of(each), accounts.get(each.key_id, 0.0), each) for each in callers]
    return min(claims, key=lambda claim: (*claim[:2], str(claim.caller)), default=Claim((False, 0), 0.0, None))


def contend(newcomers: Collection[Caller], users: Collection[Caller]) -> bool:
    """Whether both are known, and not the same keys."""
    return bool(newcomers and users) and {each.key_id for each in newcomers} != {each.key_id for each in users}


def others_each(newcomers: Collection[Caller], users: Collection[Caller], neighbours: Collection[Caller]) -> float:
    """How many others a swap counts for, for each newcomer: all `neighbours`, although only the `users` wait for it.
    Otherwise a newcomer would get more turns if the others' work is divided among several models."""
    return max(len(users), len({*users, *neighbours} - {*newcomers})) / len(newcomers)


def advantage(
    newcomers: Collection[Caller],
    users: Collection[Caller],
    accounts: Mapping[str, float],
    swap_secs: float,
    neighbours: Collection[Caller] = (),
) -> int:
    """Whether the callers of a waiting model may displace those of a loaded one at once (1), not before their patience
    ends (-1), or as if all were one caller (0). `swap_secs`: how long it takes to load both models. `neighbours` use
    other models on the same devices.

    They may if they have used so much less that the difference pays for the swap, once for each of `others_each`; they
    may not if those would then displace them in turn. 0 also if they do not `contend`.
    """
    if not contend(newcomers, users):
        return 0
    ours, theirs = claim_of(newcomers, accounts), claim_of(users, accounts)
    if ours.level != theirs.level:
        return 1 if ours.level < theirs.level else -1
    if theirs.used > max(CLEARLY * ours.used, ours.used + swap_secs * others_each(newcomers, users, neighbours)):
        return 1
    if ours.used > max(CLEARLY * theirs.used, theirs.used + swap_secs * others_each(users, newcomers, neighbours)):
        return -1
    return 0
