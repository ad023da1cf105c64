"""Keys, limits, usage and energy."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Creates the tables."""
    _keys_and_limits()
    _usage()
    op.create_table(
        "energy",
        sa.Column("hour", sa.Double, nullable=False),
        sa.Column("node", sa.String, nullable=False),
        sa.Column("device", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("key_id", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("wh", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("hour", "node", "device", "model", "key_id", "kind"),
    )


def _keys_and_limits() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("digest", sa.String, nullable=False, unique=True),
        sa.Column("prefix", sa.String, nullable=False),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("models", sa.JSON, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.Column("revision", sa.Integer, nullable=False),
    )
    in_use = sa.text("revoked_at IS NULL")
    op.create_index(
        "api_keys_name_in_use", "api_keys", ["name"], unique=True, sqlite_where=in_use, postgresql_where=in_use
    )
    op.create_table(
        "limit_states",
        sa.Column("scope", sa.String, primary_key=True),
        sa.Column("state", sa.JSON, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
    )


def _usage() -> None:
    op.create_table(
        "usage",
        sa.Column("request_id", sa.String, nullable=False),
        sa.Column("ended_at", sa.Double, nullable=False),
        sa.Column("key_id", sa.String, nullable=False),
        sa.Column("key", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("variant", sa.String, nullable=False),
        sa.Column("node", sa.String, nullable=False),
        sa.Column("instance", sa.String, nullable=False),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("prompt_tokens", sa.Integer),
        sa.Column("cached_tokens", sa.Integer),
        sa.Column("completion_tokens", sa.Integer),
        sa.Column("reasoning_tokens", sa.Integer),
        sa.Column("first_byte_secs", sa.Double),
        sa.Column("secs", sa.Double, nullable=False),
        sa.Column("queued_secs", sa.Double, nullable=False),
        sa.Column("cold", sa.Boolean, nullable=False),
        sa.Column("complete", sa.Boolean, nullable=False),
        sa.Column("energy_wh", sa.Double),
        sa.Column("cost", sa.Double),
        sa.Column("currency", sa.String),
        sa.PrimaryKeyConstraint("request_id", "ended_at"),
    )
    op.create_index("usage_ended_at", "usage", ["ended_at"])
    op.create_index("usage_key_id_ended_at", "usage", ["key_id", "ended_at"])
