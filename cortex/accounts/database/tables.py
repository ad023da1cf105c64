"""The tables. Each change is also a migration in `cortex.accounts.database.migrations`; a test compares both.

Times are UTC seconds since 1970, amounts of energy Wh.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
)

from cortex.accounts.database.latency_classes import CLASSES

METADATA = MetaData()

API_KEYS = Table(
    "api_keys",
    METADATA,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("digest", String, nullable=False, unique=True),  # SHA-256 of the key, as hex
    Column("prefix", String, nullable=False),  # the key's first characters, to recognise it by
    Column("role", String, nullable=False),
    Column("models", JSON, nullable=False),  # globs
    Column("priority", Integer, nullable=False),
    Column("weight", Double, nullable=False),
    Column("limits", JSON, nullable=False),  # `cortex.accounts.keys.api_key.KeyLimits`
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("revision", Integer, nullable=False),  # 1, and 1 more with each change of the row
)
"""Keys created with `cortex keys create` or `POST /keys`. A revoked one stays, because usage refers to it."""

Index(
    "api_keys_name_in_use",
    API_KEYS.c.name,
    unique=True,
    sqlite_where=API_KEYS.c.revoked_at.is_(None),
    postgresql_where=API_KEYS.c.revoked_at.is_(None),
)

SESSIONS = Table(
    "sessions",
    METADATA,
    Column("digest", String, primary_key=True),  # SHA-256 of the secret in the browser's cookie, as hex
    Column("subject", String, nullable=False),
    Column("name", String, nullable=False),
    Column("groups", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Index("sessions_expires_at", "expires_at"),
)
"""Browsers that people have signed in with (`cortex.accounts.sign_in.person.Person`)."""

DRAINED_NODES = Table("drained_nodes", METADATA, Column("node", String, primary_key=True))
"""Neurons that operators have taken out of use, for all cortexes. PostgreSQL only; else the state file has them."""

HELD_MODELS = Table(
    "held_models",
    METADATA,
    Column("model", String, primary_key=True),
    Column("node", String, primary_key=True),  # `*`: all
    Column("until", Double, nullable=False),
)
"""Models that operators hold back, as above."""

DECISIONS_VERSION = Table(
    "decisions_version",
    METADATA,
    Column("id", String, primary_key=True),  # random, of this database
    Column("changes", BigInteger, nullable=False),
)
"""One row: how often the two tables above have changed. A copy that is older than another has a lower number."""

LIMIT_STATES = Table(
    "limit_states",
    METADATA,
    Column("scope", String, primary_key=True),
    Column("state", JSON, nullable=False),
    Column("updated_at", Double, nullable=False),
)
"""What is left of each limit, by scope: a key, a model, or the models of a key that match a glob."""

USAGE = Table(
    "usage",
    METADATA,
    Column("request_id", String, nullable=False),
    Column("ended_at", Double, nullable=False),
    Column("key_id", String, nullable=False),
    Column("key", String, nullable=False),
    Column("model", String, nullable=False),
    Column("variant", String, nullable=False),
    Column("node", String, nullable=False),
    Column("instance", String, nullable=False),
    Column("path", String, nullable=False),
    Column("status", Integer, nullable=False),
    Column("prompt_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("reasoning_tokens", Integer),
    Column("first_byte_secs", Double),
    Column("secs", Double, nullable=False),
    Column("queued_secs", Double, nullable=False),
    Column("cold", Boolean, nullable=False),
    Column("complete", Boolean, nullable=False),
    Column("energy_wh", Double),
    Column("cost", Double),
    Column("currency", String),
    PrimaryKeyConstraint("request_id", "ended_at"),
    Index("usage_ended_at", "ended_at"),
    Index("usage_key_id_ended_at", "key_id", "ended_at"),
)
"""The fields of `cortex.accounts.usage.record.UsageRecord`, and what is calculated from them."""

USAGE_TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
LATENCY_CLASSES = tuple(f"first_byte_class_{number}" for number in range(CLASSES))

USAGE_DAYS = Table(
    "usage_days",
    METADATA,
    Column("day", Double, nullable=False),  # its first second
    Column("key_id", String, nullable=False),
    Column("key", String, nullable=False),
    Column("model", String, nullable=False),
    Column("variant", String, nullable=False),
    Column("node", String, nullable=False),
    Column("path", String, nullable=False),
    Column("status", Integer, nullable=False),
    Column("currency", String, nullable=False),  # "" for records without a cost
    Column("requests", BigInteger, nullable=False),
    *(Column(name, BigInteger, nullable=False) for name in USAGE_TOKENS),
    Column("cost", Double, nullable=False),
    Column("energy_wh", Double, nullable=False),
    Column("cold_starts", BigInteger, nullable=False),
    Column("first_byte_secs", Double, nullable=False),
    *(Column(name, BigInteger, nullable=False) for name in LATENCY_CLASSES),  # how many records have one of each
    PrimaryKeyConstraint("day", "key_id", "key", "model", "variant", "node", "path", "status", "currency"),
)
"""Sums over the records of usage of each day. They have those that were deleted too."""

USAGE_JOURNALS = Table(
    "usage_journals",
    METADATA,
    Column("name", String, primary_key=True),
    Column("position", Integer, nullable=False),
    Column("updated_at", Double, nullable=False),
)
"""How many bytes of each journal file are in the table of usage."""

ENERGY = Table(
    "energy",
    METADATA,
    Column("hour", Double, nullable=False),
    Column("node", String, nullable=False),
    Column("device", String, nullable=False),
    Column("model", String, nullable=False),
    Column("key_id", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("wh", Double, nullable=False),
    PrimaryKeyConstraint("hour", "node", "device", "model", "key_id", "kind"),
)
"""Energy by hour (its first second), device, and what it was used for."""

ENERGY_METERS = Table(
    "energy_meters",
    METADATA,
    Column("node", String, nullable=False),
    Column("device", String, nullable=False),
    Column("model", String, nullable=False),  # "" for the device itself
    Column("instance", String, nullable=False),
    Column("epoch", String, nullable=False),
    Column("read_at", Double, nullable=False),
    Column("active_wh", Double, nullable=False),
    Column("resident_wh", Double, nullable=False),  # of a device all of it
    PrimaryKeyConstraint("node", "device", "model", "instance"),
)
"""The counts of the neurons as last read: what is above them has not been booked."""

ENERGY_SLICES = Table(
    "energy_slices",
    METADATA,
    Column("node", String, nullable=False),
    Column("device", String, nullable=False),
    Column("model", String, nullable=False),
    Column("instance", String, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double, nullable=False),
    Column("active_wh", Double, nullable=False),
    Column("resident_wh", Double, nullable=False),
    PrimaryKeyConstraint("node", "device", "model", "instance", "started_at"),
    Index("energy_slices_ended_at", "ended_at"),
)
"""What instances have used and is not booked yet: requests that ran then may still run."""
