"""What a key is to allow, as people write and read it: in a file, in `/keys` and on the command line. Pure."""

from __future__ import annotations

import re
from datetime import date, datetime, timezone
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, field_validator

from cortex.accounts.caller import Role
from cortex.accounts.keys.api_key import ApiKey
from cortex.accounts.limits.budget_window import CALENDAR
from cortex.accounts.limits.terms import Budget, KeyLimits, Limits
from cortex.config.durations import exact_duration, parse_duration
from cortex.config.model_tables import MAX_COUNT
from shared.settings import SettingsModel

MAX_PRIORITY = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_BUDGET = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+) ?/ ?(\w[\w. ]*)")
_CURRENCY = re.compile(r"[A-Z]{3}")
_MIN_WINDOW_SECS = 60.0
_BUDGET_FORM = "write it as 20EUR/month, 1000000tokens/day or, for a rolling window, 5EUR/7d"


def parse_budget(text: str) -> Budget:
    """`20EUR/month`, `1000000tokens/day`, `5EUR/7d`: an amount of money or tokens in an hour, day, week or month of the
    calendar, or in a rolling window.

    Raises:
        ValueError: anything else.
    """
    found = _BUDGET.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"invalid budget {text!r}: {_BUDGET_FORM}")
    amount, unit, window = float(found[1]), found[2], found[3].strip()
    if amount > MAX_COUNT:
        raise ValueError(f"invalid budget: at most {MAX_COUNT} is possible")
    if unit in ("token", "tokens"):
        unit = "tokens"
    elif not _CURRENCY.fullmatch(unit):
        raise ValueError(f"invalid budget {text!r}: {unit!r} must be tokens or a currency such as EUR")
    if window in CALENDAR:
        return Budget(amount, unit, window)
    try:
        secs = parse_duration(window)
    except ValueError as error:
        raise ValueError(f"invalid budget {text!r}: {_BUDGET_FORM}") from error
    if secs < _MIN_WINDOW_SECS:
        raise ValueError(f"invalid budget {text!r}: the window must be at least a minute")
    return Budget(amount, unit, secs)


def budget_text(budget: Budget) -> str:
    """The budget as `parse_budget` reads it."""
    window = budget.window if isinstance(budget.window, str) else exact_duration(budget.window)
    return f"{budget.amount:.15g}{budget.unit}/{window}"


Moment: TypeAlias = str | datetime | date
_MOMENTS = "2027-01-31 or 2027-01-31T12:00:00Z"


def parse_expiry(value: Moment, now: float) -> float:
    """UTC seconds of `30d`, counted from now, or of a moment as `parse_moment` reads it.

    Raises:
        ValueError: anything else, or the past.
    """
    try:
        until = now + parse_duration(value) if isinstance(value, str) else parse_moment(value)
    except ValueError:
        until = parse_moment(value, f"30d, {_MOMENTS}")
    if until <= now:
        raise ValueError(f"{value} is in the past")
    return until


def parse_moment(value: Moment, forms: str = _MOMENTS) -> float:
    """UTC seconds of the start of a day such as `2027-01-31`, or of a time such as `2027-01-31T12:00:00+01:00`; UTC
    without an offset. `forms`: what the error recommends.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, datetime):
        return _utc(value)
    text = str(value).strip()
    try:
        return _utc(datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text))
    except ValueError as error:
        raise ValueError(f"invalid time {text!r}: write it as {forms}") from error


def _utc(value: datetime) -> float:
    return (value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)).timestamp()


def parse_model_limits(text: str) -> tuple[str, dict[str, Any]]:
    """The glob and the limits of `GLOB:rpm=5,tpm=1000,budget=5EUR/day`.

    Raises:
        ValueError: anything else.
    """
    glob, colon, rest = text.rpartition(":")
    limits: dict[str, Any] = {}
    for part in rest.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not glob or not colon or not equals or name not in ("rpm", "tpm", "parallel", "budget") or name in limits:
            raise ValueError(f"invalid limit {text!r}: write it as GLOB:rpm=5,tpm=1000,parallel=2,budget=5EUR/day")
        limits[name] = value if name == "budget" else _whole(value, text)
    return glob, limits


def _whole(value: str, text: str) -> int:
    if not value.isdigit():
        raise ValueError(f"invalid limit {text!r}: {value!r} must be a whole number")
    return int(value)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Budgets = Annotated[list[str], BeforeValidator(_listed)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Glob = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]


class LimitTerms(SettingsModel):
    """Limits, as `Limits` has them. `budget`: one or several, as `parse_budget` reads them."""

    rpm: Count | None = None
    tpm: Count | None = None
    parallel: Count | None = None
    budget: Budgets = Field(default_factory=list)

    @field_validator("budget")
    @classmethod
    def _readable(cls, value: list[str]) -> list[str]:
        windows = [(budget.unit, budget.window) for budget in map(parse_budget, value)]
        if len(set(windows)) < len(windows):
            raise ValueError("two budgets have the same unit and window")
        return value

    @property
    def as_limits(self) -> Limits:
        """These limits as what enforces them takes them."""
        return Limits(self.rpm, self.tpm, self.parallel, tuple(map(parse_budget, self.budget)))


class KeyTerms(LimitTerms):
    """A key's name and what it allows. `models`: globs of model ids, empty for all. `limits`: by such a glob, what the
    models that match it may use together; they hold beside the limits of the key. `expires`: see `parse_expiry`."""

    name: str
    role: Role = "user"
    models: list[Glob] = Field(default_factory=list)
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    weight: Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False)] = 1.0
    expires: Moment | None = None
    limits: dict[Glob, LimitTerms] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("must start with a letter or digit and hold only letters, digits, '.', '_', '@' and '-'")
        return value

    @property
    def key_limits(self) -> KeyLimits:
        """All limits of the key."""
        return KeyLimits(self.as_limits, {glob: terms.as_limits for glob, terms in self.limits.items()})


def foreign_budget(limits: KeyLimits, currency: str) -> str | None:
    """What is wrong with a budget in another currency than the prices: it would be counted wrong. None if none is."""
    every = [limits.total, *limits.by_models.values()]
    for budget in (budget for each in every for budget in each.budgets):
        if budget.unit not in ("tokens", currency):
            return f"the budget {budget_text(budget)} must be in {currency}, the currency of the prices ([usage])"
    return None


def key_object(key: ApiKey) -> dict[str, Any]:
    """A key as `/keys` shows it; the limits as `POST /keys` takes them."""
    return {
        "id": key.id,
        "name": key.name,
        "prefix": key.prefix,
        "role": key.role,
        "models": list(key.models),
        "priority": key.priority,
        "weight": key.weight,
        **_limits_object(key.limits.total),
        "limits": {glob: _limits_object(limits) for glob, limits in key.limits.by_models.items()},
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "source": key.source,
    }


def _limits_object(limits: Limits) -> dict[str, Any]:
    return {
        "rpm": limits.rpm,
        "tpm": limits.tpm,
        "parallel": limits.parallel,
        "budget": [budget_text(budget) for budget in limits.budgets],
    }
