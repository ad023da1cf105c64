"""Sums over the energy that was booked, and over what waits for it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, Select, Subquery, case, func, literal_column, or_, select, union_all

from cortex.accounts.caller import PERSON_PREFIX
from cortex.accounts.database.tables import API_KEYS, ENERGY, ENERGY_SLICES, USAGE
from cortex.accounts.keys.api_key import PROVISIONED_PREFIXES
from cortex.accounts.usage.periods import period
from cortex.accounts.usage.query import TIMES, EnergyQuery


def energy_report(query: EnergyQuery, *, is_postgresql: bool) -> Select[Any]:
    """The groups, in their order, and the `energy_wh` of each. Without groups it is one row."""
    used = _used(query).subquery()
    groups: dict[str, ColumnElement[Any]] = {}
    for name in query.group_by:
        if name in TIMES:
            groups[name] = period(name, used.c.at, is_postgresql=is_postgresql)
        else:
            groups[name] = _key_name(used) if name == "key" else used.c[name]
    columns = [column.label(name) for name, column in groups.items()]
    wh = func.coalesce(func.sum(used.c.wh), 0.0).label("energy_wh")
    asked = select(*columns, wh).where(*_chosen(query, used))
    return asked.group_by(*groups.values()).order_by(*groups.values()) if groups else asked


def _used(query: EnergyQuery) -> Any:
    """What the meters have counted: what was booked, and what engines have used since."""
    booked, waiting = ENERGY.c, ENERGY_SLICES.c  # a slice lies within an hour
    return union_all(
        select(
            booked.hour.label("at"), booked.node, booked.device, booked.model, booked.key_id, booked.kind, booked.wh
        ).where(booked.hour >= query.since, booked.hour < query.until),
        select(
            waiting.started_at.label("at"),
            waiting.node,
            waiting.device,
            waiting.model,
            literal_column("''").label("key_id"),
            literal_column("'pending'").label("kind"),
            (waiting.active_wh + waiting.resident_wh).label("wh"),
        ).where(waiting.started_at >= query.since, waiting.started_at < query.until),
    )


def _key_name(used: Subquery) -> ColumnElement[Any]:
    """The name of a key, also of a revoked one, or of a person; "" for what neither has used."""
    stored = select(API_KEYS.c.name).where(API_KEYS.c.id == used.c.key_id).scalar_subquery()
    provisioned = [
        (used.c.key_id.startswith(prefix), func.substr(used.c.key_id, len(prefix) + 1))
        for prefix in PROVISIONED_PREFIXES
    ]
    return case(*provisioned, else_=func.coalesce(stored, _person_name(used), used.c.key_id))


def _person_name(used: Subquery) -> ScalarSelect[Any]:
    """As in the person's last request: no other table has it."""
    own = USAGE.c.key_id == used.c.key_id, used.c.key_id != literal_column("''")
    return (
        select(USAGE.c.key).where(*own).order_by(USAGE.c.ended_at.desc()).limit(literal_column("1")).scalar_subquery()
    )


def _chosen(query: EnergyQuery, used: Subquery) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = [
        used.c[name].in_(only)
        for name, only in (("node", query.nodes), ("model", query.models), ("kind", query.kinds))
        if only
    ]
    if query.key_id is not None:
        found.append(used.c.key_id == query.key_id)
    if query.keys:
        ids = [prefix + name for prefix in PROVISIONED_PREFIXES for name in query.keys]
        stored = select(API_KEYS.c.id).where(API_KEYS.c.name.in_(query.keys))
        people = [name for name in query.keys if name.startswith(PERSON_PREFIX)]
        signed_in = select(USAGE.c.key_id).where(USAGE.c.key.in_(people))
        found.append(or_(*(used.c.key_id.in_(some) for some in ([*query.keys, *ids], stored, signed_in))))
    return found
