"""Checks the tokens of an issuer. Pure, apart from the clock that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from joserfc import jws, jwt
from joserfc.errors import ExpiredTokenError, InvalidClaimError, JoseError, MissingClaimError
from joserfc.jwk import ECKey, KeySet, OKPKey, RSAKey
from joserfc.jwt import JWTClaimsRegistry

from shared.errors import Unauthorized, shortened

ALGORITHMS: Final = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"),
)
"""Signatures with a private key only. With a shared secret (HS256), the public key would be enough to sign."""
LEEWAY_SECS: Final = 60
"""By which the clocks of the issuer and of this host may differ."""
MAX_BYTES: Final = 32768
_TYPES: Final = (None, "jwt", "at+jwt", "application/at+jwt")
"""Of a token's header. Others are not for this: a logout token names a person, too."""
_NEEDED_KEYS: Final = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
"""Type of key by the start of the algorithm."""
PublicKey = RSAKey | ECKey | OKPKey


class UnknownSigningKey(Exception):
    """None of the issuer's keys, as they are known, has signed the token: they may be out of date."""


def public_keys(document: Any) -> list[PublicKey]:
    """The keys of a JWKS document that can check signatures; others are left out.

    Raises:
        ValueError: it is another document.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("it has no list `keys`")  # noqa: TRY004 - of a document, not of an argument
    found: list[PublicKey] = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("kty") == "oct" or entry.get("use", "sig") != "sig":
            continue
        try:
            keys = KeySet.import_key_set({"keys": [entry]}).keys
        except (JoseError, ValueError, KeyError, TypeError):
            continue
        found += [key for key in keys if isinstance(key, RSAKey | ECKey | OKPKey)]
    return found


def claims_of(
    token: bytes, keys: Sequence[PublicKey], *, issuer: str, audiences: Sequence[str], now: float
) -> dict[str, Any]:
    """The claims of a token that is signed with one of the keys, by this issuer, for one of the audiences, and valid
    now (UTC seconds).

    Raises:
        UnknownSigningKey: see there.
        Unauthorized: it is not.
    """
    if len(token) > MAX_BYTES:
        raise Unauthorized(f"invalid token: more than {MAX_BYTES} bytes")
    try:
        header = jws.extract_compact(token).headers()
    except (JoseError, ValueError, TypeError) as error:
        raise Unauthorized("invalid token: it is not a signed JWT") from error
    algorithm, kind = header.get("alg"), header.get("typ")
    if algorithm not in ALGORITHMS:
        raise Unauthorized(f"invalid token: the algorithm {shortened(str(algorithm))!r} is not accepted")
    if (kind.lower() if isinstance(kind, str) else kind) not in _TYPES:
        raise Unauthorized(f"invalid token: the type {shortened(str(kind))!r} is not accepted")
    claims = _signed(token, _fitting(keys, header.get("kid"), algorithm), algorithm)
    _check(claims, issuer, audiences, int(now))
    return claims


def _fitting(keys: Sequence[PublicKey], key_id: object, algorithm: str) -> list[PublicKey]:
    kind = _NEEDED_KEYS[algorithm[:2]]
    fitting = [key for key in keys if key.key_type == kind and key.get("alg") in (None, algorithm)]
    return fitting if key_id is None else [key for key in fitting if key.kid in (None, key_id)]


def _signed(token: bytes, keys: Sequence[PublicKey], algorithm: str) -> dict[str, Any]:
    for key in keys:
        try:
            return dict(jwt.decode(token, key, algorithms=[algorithm]).claims)
        except (JoseError, ValueError, TypeError):
            continue
    raise UnknownSigningKey


def _check(claims: dict[str, Any], issuer: str, audiences: Sequence[str], now: int) -> None:
    registry = JWTClaimsRegistry(
        now=now,
        leeway=LEEWAY_SECS,
        iss={"essential": True, "value": issuer},
        aud={"essential": True, "values": list(audiences)},
        exp={"essential": True},
    )
    try:
        registry.validate(claims)
    except ExpiredTokenError as error:
        raise Unauthorized("the token has expired: sign in again") from error
    except (MissingClaimError, InvalidClaimError) as error:
        claim = str(error.claim)
        hint = ": it must be the client_id or one of audiences in [auth.oidc]" if claim == "aud" else ""
        given = f"{claim} is {shortened(repr(claims[claim]))}" if claim in claims else f"it has no {claim}"
        raise Unauthorized(f"invalid token: {given}{hint}") from error
    if "events" in claims:
        raise Unauthorized("invalid token: it reports an event (claim `events`)")
