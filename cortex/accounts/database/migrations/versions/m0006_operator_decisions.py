"""Drained neurons and models held back, for all cortexes of one database."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Creates the tables, and gives the database an id."""
    op.create_table("drained_nodes", sa.Column("node", sa.String, nullable=False), sa.PrimaryKeyConstraint("node"))
    op.create_table(
        "held_models",
        sa.Column("model", sa.String, nullable=False),
        sa.Column("node", sa.String, nullable=False),
        sa.Column("until", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("model", "node"),
    )
    version = op.create_table(
        "decisions_version",
        sa.Column("id", sa.String, nullable=False),
        sa.Column("changes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.bulk_insert(version, [{"id": uuid.uuid4().hex, "changes": 0}])
