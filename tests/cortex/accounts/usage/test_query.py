"""The query of `/usage`: what it may say, what an error names, and who sees what."""

from __future__ import annotations

import pytest

from cortex.accounts.caller import ANONYMOUS, Caller
from cortex.accounts.usage.query import DEFAULT_SECS, GROUPS, parse_query, seen_by
from shared.errors import Forbidden, InvalidRequest

NOW = 1_795_953_600.0  # 2026-11-29T12:00:00Z
MIDNIGHT = NOW - 12 * 3600


@pytest.mark.parametrize(
    ("text", "secs"),
    [
        ("2026-11-29", MIDNIGHT),
        ("2026-11-29T00:00:00Z", MIDNIGHT),
        ("2026-11-29T00:00", MIDNIGHT),
        ("2026-11-29T01:00:00+01:00", MIDNIGHT),
        ("1795910400", MIDNIGHT),
        ("1795910400.5", MIDNIGHT + 0.5),
        ("7d", NOW - 7 * 86_400),
        ("1h30m", NOW - 5400),
    ],
)
def test_times_as_people_and_programs_write_them(text: str, secs: float) -> None:
    assert parse_query([("from", text)], NOW).since == secs


def test_a_report_without_times_is_of_the_last_month() -> None:
    query = parse_query([], NOW)
    assert (query.since, query.until, query.group_by) == (NOW - DEFAULT_SECS, NOW, ())


def test_lists_are_separated_by_commas_or_repeated() -> None:
    query = parse_query([("group_by", "key, model"), ("group_by", "day,key"), ("model", "a/b,c"), ("key", "x")], NOW)
    assert (query.group_by, query.models, query.keys) == (("key", "model", "day"), ("a/b", "c"), ("x",))


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        (("groupby", "key"), "groupby", "allowed are group_by, from, to, key, model"),
        (("group_by", "key,user"), "group_by", f"'user'; allowed are {', '.join(GROUPS)}"),
        (("from", "yesterday"), "from", "'yesterday' cannot be read: write 2026-11-29"),
        (("to", "2026-13-01"), "to", "cannot be read"),
        (("to", "9" * 400), "to", "cannot be read"),
        (("from", "2026-11-30"), "from", "from must be before to"),
        (("to", "1d,2d"), "to", "to takes one time"),
    ],
)
def test_a_wrong_query_is_explained(given: tuple[str, str], param: str, message: str) -> None:
    """The error names the parameter and what is allowed."""
    with pytest.raises(InvalidRequest) as raised:
        parse_query([given], NOW)
    assert raised.value.param == param
    assert message in raised.value.message


def test_a_user_sees_itself_and_a_viewer_all() -> None:
    """An unlimited query of a user becomes one of its own usage; one of another key is refused."""
    user, viewer = Caller("k1", "alice"), Caller("k2", "bob", role="viewer")
    query = parse_query([], NOW)
    assert seen_by(user, query).key_id == "k1"
    assert seen_by(user, parse_query([("key", "alice")], NOW)).key_id == "k1"
    assert seen_by(viewer, query).key_id is None
    assert seen_by(ANONYMOUS, query).key_id is None
    with pytest.raises(Forbidden):
        seen_by(Caller("", "anonymous", role="user"), query)
    with pytest.raises(Forbidden, match="sees its own usage only, not that of 'bob'"):
        seen_by(user, parse_query([("key", "alice,bob")], NOW))
