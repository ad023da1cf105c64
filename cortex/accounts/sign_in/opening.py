"""Creates the sign-in that the configuration describes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cortex.accounts.sign_in.issuer import Issuer
from cortex.accounts.sign_in.sign_in import SignIn
from cortex.config.live import LiveConfig

if TYPE_CHECKING:  # imports SQLAlchemy, which a cortex without a database does not need
    from cortex.accounts.database.database import Database
    from cortex.accounts.sign_in.sessions import Sessions


def open_sign_in(live: LiveConfig, database: Database | None) -> SignIn | None:
    """None without `[auth.oidc]`. Close it in the end. The database stays the caller's."""
    settings = live.config.auth.oidc
    if not settings.on:
        return None
    sessions: Sessions | None = None
    if database is not None and not database.read_only:
        from cortex.accounts.sign_in.sessions import Sessions  # noqa: PLC0415 - imports SQLAlchemy

        sessions = Sessions(database)
    return SignIn(lambda: live.config.auth.oidc, Issuer(settings), sessions)
