"""The neurons' meters as last read, and energy that is not booked yet."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Creates the tables."""
    op.create_table(
        "energy_meters",
        sa.Column("node", sa.String, nullable=False),
        sa.Column("device", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("instance", sa.String, nullable=False),
        sa.Column("epoch", sa.String, nullable=False),
        sa.Column("read_at", sa.Double, nullable=False),
        sa.Column("active_wh", sa.Double, nullable=False),
        sa.Column("resident_wh", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("node", "device", "model", "instance"),
    )
    op.create_table(
        "energy_slices",
        sa.Column("node", sa.String, nullable=False),
        sa.Column("device", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("instance", sa.String, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double, nullable=False),
        sa.Column("active_wh", sa.Double, nullable=False),
        sa.Column("resident_wh", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("node", "device", "model", "instance", "started_at"),
    )
    op.create_index("energy_slices_ended_at", "energy_slices", ["ended_at"])
