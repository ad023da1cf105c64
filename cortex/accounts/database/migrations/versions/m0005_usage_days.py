"""Sums over the records of usage of each day, filled from the existing records."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_NAMES = ("key_id", "key", "model", "variant", "node", "path")
_TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
_BOUNDS = tuple(0.01 * 2 ** (number / 2) for number in range(31))


def upgrade() -> None:
    """Creates and fills the table."""
    key = ("day", *_NAMES, "status", "currency")
    classes = [f"first_byte_class_{number}" for number in range(32)]
    op.create_table(
        "usage_days",
        sa.Column("day", sa.Double, nullable=False),
        *(sa.Column(name, sa.String, nullable=False) for name in _NAMES),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("currency", sa.String, nullable=False),
        sa.Column("requests", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _TOKENS),
        sa.Column("cost", sa.Double, nullable=False),
        sa.Column("energy_wh", sa.Double, nullable=False),
        sa.Column("cold_starts", sa.BigInteger, nullable=False),
        sa.Column("first_byte_secs", sa.Double, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in classes),
        sa.PrimaryKeyConstraint(*key),
    )
    days = "floor(ended_at / 86400)" if op.get_bind().dialect.name == "postgresql" else "CAST(ended_at / 86400 AS int)"
    lower, upper = ("-1e300", *map(repr, _BOUNDS)), (*map(repr, _BOUNDS), "1e300")
    sums = [
        "count(*)",
        *(f"coalesce(sum({name}), 0)" for name in (*_TOKENS, "cost", "energy_wh")),
        "sum(CASE WHEN cold THEN 1 ELSE 0 END)",
        "coalesce(sum(first_byte_secs), 0)",
        *(
            f"sum(CASE WHEN first_byte_secs > {above} AND first_byte_secs <= {to} THEN 1 ELSE 0 END)"
            for above, to in zip(lower, upper, strict=True)
        ),
    ]
    chosen = (f"{days} * 86400.0", *_NAMES, "status", "coalesce(currency, '')")
    op.execute(
        f"INSERT INTO usage_days SELECT {', '.join((*chosen, *sums))} FROM usage"  # noqa: S608 - constants
        f" GROUP BY {', '.join(str(place + 1) for place in range(len(chosen)))}"
    )
