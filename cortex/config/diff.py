"""What a new configuration changes. Pure: takes two configurations, returns the effective one and a description of
the changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from pydantic import BaseModel

from cortex.config.catalogue import Catalogue
from cortex.config.model_tables import Variant
from cortex.config.settings import CortexConfig
from cortex.config.shown import SECRET, without_secrets


class Reload(Enum):
    """What a reload does with a changed key."""

    APPLIES = "applies"
    NEEDS_RESTART = "needs a restart"


RELOAD_OF: Mapping[str, Reload] = {
    "models_config": Reload.APPLIES,
    "neurons": Reload.APPLIES,
    "keys.file": Reload.APPLIES,
    "auth.trust_loopback": Reload.APPLIES,
    "auth.oidc.groups_claim": Reload.APPLIES,
    "auth.oidc.roles.user": Reload.APPLIES,
    "auth.oidc.roles.viewer": Reload.APPLIES,
    "auth.oidc.roles.operator": Reload.APPLIES,
    "auth.oidc.roles.admin": Reload.APPLIES,
    "auth.oidc.default_role": Reload.APPLIES,
    "auth.oidc.session_hours": Reload.APPLIES,
    "poll.interval_secs": Reload.APPLIES,
    "poll.timeout_secs": Reload.APPLIES,
    "poll.unhealthy_after": Reload.APPLIES,
    "cold_load.timeout_secs": Reload.APPLIES,
    "placement.min_residency_secs": Reload.APPLIES,
    "placement.patience_secs": Reload.APPLIES,
    "placement.starvation_secs": Reload.APPLIES,
    "placement.fairness_half_life_secs": Reload.APPLIES,
    "placement.pause_secs": Reload.APPLIES,
    "placement.replica_target": Reload.APPLIES,
    "placement.load_ahead": Reload.APPLIES,
    "placement.scale_up_secs": Reload.APPLIES,
    "placement.scale_down_secs": Reload.APPLIES,
    "routing.session_header": Reload.APPLIES,
    "routing.prefix_chars": Reload.APPLIES,
    "routing.load_factor": Reload.APPLIES,
    "waiting.per_model": Reload.APPLIES,
    "waiting.total": Reload.APPLIES,
    "waiting.first_comment_secs": Reload.APPLIES,
    "waiting.comment_interval_secs": Reload.APPLIES,
    "waiting.plain_keepalive": Reload.APPLIES,
    "usage.currency": Reload.APPLIES,
    "usage.retention_days": Reload.APPLIES,
    "usage.daily_retention_days": Reload.APPLIES,
    "energy.price_per_kwh": Reload.APPLIES,
    "tracing.endpoint": Reload.NEEDS_RESTART,
    "tracing.sample_ratio": Reload.NEEDS_RESTART,
    "state_dir": Reload.NEEDS_RESTART,
    "database": Reload.NEEDS_RESTART,
    "log_level": Reload.NEEDS_RESTART,
    "log_format": Reload.NEEDS_RESTART,
    "gateway.listen": Reload.NEEDS_RESTART,
    "gateway.metrics_listen": Reload.NEEDS_RESTART,
    "gateway.workers": Reload.NEEDS_RESTART,
    "gateway.max_body_mib": Reload.NEEDS_RESTART,
    "gateway.drain_timeout_secs": Reload.NEEDS_RESTART,
    "gateway.keepalive_secs": Reload.NEEDS_RESTART,
    "gateway.default_model": Reload.NEEDS_RESTART,
    "gateway.allowed_origins": Reload.NEEDS_RESTART,
    "gateway.allowed_hosts": Reload.NEEDS_RESTART,
    "gateway.allow_anonymous": Reload.NEEDS_RESTART,
    "auth.oidc.issuer": Reload.NEEDS_RESTART,
    "auth.oidc.client_id": Reload.NEEDS_RESTART,
    "auth.oidc.client_secret": Reload.NEEDS_RESTART,
    "auth.oidc.client_secret_env": Reload.NEEDS_RESTART,
    "auth.oidc.client_secret_file": Reload.NEEDS_RESTART,
    "auth.oidc.cli_client_id": Reload.NEEDS_RESTART,
    "auth.oidc.audiences": Reload.NEEDS_RESTART,
    "auth.oidc.scopes": Reload.NEEDS_RESTART,
    "auth.oidc.redirect_url": Reload.NEEDS_RESTART,
    "discovery.kind": Reload.NEEDS_RESTART,
    "discovery.host": Reload.NEEDS_RESTART,
    "discovery.selector": Reload.NEEDS_RESTART,
    "discovery.namespace": Reload.NEEDS_RESTART,
    "discovery.port": Reload.NEEDS_RESTART,
    "discovery.tls": Reload.NEEDS_RESTART,
    "discovery.token": Reload.NEEDS_RESTART,
    "discovery.token_env": Reload.NEEDS_RESTART,
    "discovery.interval_secs": Reload.NEEDS_RESTART,
    "discovery.grace_secs": Reload.NEEDS_RESTART,
    "discovery.registration_token_env": Reload.NEEDS_RESTART,
    "discovery.registration_token_file": Reload.NEEDS_RESTART,
    "discovery.dial_listen": Reload.NEEDS_RESTART,
    "neuron_tls.ca": Reload.NEEDS_RESTART,
    "neuron_tls.cert": Reload.NEEDS_RESTART,
    "neuron_tls.key": Reload.NEEDS_RESTART,
    "gateway.tls_cert": Reload.NEEDS_RESTART,
    "gateway.tls_key": Reload.NEEDS_RESTART,
    "gateway.metrics_token": Reload.NEEDS_RESTART,
    "gateway.metrics_token_env": Reload.NEEDS_RESTART,
}
"""Every key of cortex.toml. Write APPLIES only if every reader of the key sees the new value: the control reads
`LiveConfig` on each use, and each worker is given the configuration again (`Gateway.configure`)."""
MAX_NAMED = 40
"""Limit on changes listed in one log line."""


@dataclass(frozen=True)
class Difference:
    """`config` and `catalogue` are in effect from now on: the same objects as before when nothing changed, with the
    old values for the keys in `restart`, which need a restart."""

    config: CortexConfig
    catalogue: Catalogue
    lines: tuple[str, ...]
    restart: tuple[str, ...]

    def __str__(self) -> str:
        if not self.lines:
            return "no changes"
        more = len(self.lines) - MAX_NAMED
        return ", ".join(self.lines[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def difference(
    config: CortexConfig, catalogue: Catalogue, new_config: CortexConfig, new_catalogue: Catalogue
) -> Difference:
    """The configuration in effect after replacing the first pair with the second, and what changed."""
    effective = _with_kept(config, new_config)
    settings, restart = (
        [
            line
            for key in CortexConfig.model_fields
            if key != "neurons"
            for line in _changes(key, getattr(before, key), getattr(after, key))
        ]
        for before, after in ((config, effective), (effective, new_config))
    )
    neurons = _named(
        "neuron", {entry.name: entry for entry in config.neurons}, {entry.name: entry for entry in effective.neurons}
    )
    models = _named(
        "model", {model.id: model for model in catalogue.models}, {model.id: model for model in new_catalogue.models}
    )
    aliases = _named("alias", _aliases(catalogue), _aliases(new_catalogue))
    return Difference(
        config=config if effective == config else effective,
        catalogue=catalogue if new_catalogue == catalogue else new_catalogue,
        lines=(*neurons, *models, *aliases, *settings),
        restart=tuple(restart),
    )


def _aliases(catalogue: Catalogue) -> dict[str, object]:
    """As they are written: those without parameters in the short form."""
    return {name: alias if alias.parameters else alias.model for name, alias in catalogue.aliases.items()}


_Model = TypeVar("_Model", bound=BaseModel)


def _with_kept(before: _Model, after: _Model, table: str = "") -> _Model:
    """`after` with the values of `before` for the keys that need a restart."""
    kept: dict[str, object] = {}
    for name in type(before).model_fields:
        key, old, new = f"{table}{name}", getattr(before, name), getattr(after, name)
        if isinstance(old, BaseModel) and isinstance(new, BaseModel):
            kept[name] = _with_kept(old, new, f"{key}.")
        elif RELOAD_OF[key] is Reload.NEEDS_RESTART:
            kept[name] = old
    return after.model_copy(update=kept)


def _named(kind: str, before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[str]:
    """What was added, removed and changed."""
    yield from (f"+{kind} {name}" for name in after if name not in before)
    yield from (f"-{kind} {name}" for name in before if name not in after)
    for name in before:
        if name in after and before[name] != after[name]:
            yield f"{kind} {name}: {', '.join(_fields(before[name], after[name]))}"


def _fields(before: object, after: object) -> Iterable[str]:
    if isinstance(before, BaseModel) and isinstance(after, BaseModel):
        return [
            line
            for key in type(before).model_fields
            for line in _changes(key, getattr(before, key), getattr(after, key))
        ]
    return [f"{_shown(before)} -> {_shown(after)}"]


def _changes(key: str, before: object, after: object) -> list[str]:
    """One line per changed value, recursing into tables."""
    if before == after:
        return []
    if key.rpartition(".")[2] in SECRET:
        return [f"{key} changed"]
    if isinstance(before, BaseModel) and isinstance(after, BaseModel):
        return [
            line
            for inner in type(before).model_fields
            for line in _changes(f"{key}.{inner}", getattr(before, inner), getattr(after, inner))
        ]
    if key == "variants" and isinstance(before, tuple) and isinstance(after, tuple):
        return _variant_changes(before, after)
    return [f"{key} {_shown(before)} -> {_shown(after)}"]


def _variant_changes(before: tuple[Variant, ...], after: tuple[Variant, ...]) -> list[str]:
    old, new = ({str(each.name): each for each in every} for every in (before, after))
    order = [] if list(old) == list(new) else [f"variants {list(old)} -> {list(new)}"]
    kept = [name for name in old if name in new]
    return order + [line for name in kept for line in _changes(f"variants.{name}", old[name], new[name])]


def _shown(value: object) -> str:
    if isinstance(value, BaseModel):
        return str(without_secrets(value.model_dump(exclude_none=True)))
    if isinstance(value, float):
        return f"{value:g}"
    return str(without_secrets(value))
