"""Which engines get a key. An engine with a key serves only callers that read the key from neuron's answers, which a
cortex that speaks only protocol v1 does not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from pathlib import Path

from neuron.config import KeyMode
from shared.system.files import replace_file

log = logging.getLogger(__name__)

FILE_NAME = "protocol-v1-callers"
"""In the state directory; exists once a caller that speaks only protocol v1 has used this neuron."""


def gets_key(mode: KeyMode, *, has_token: bool, carries_keys: bool, v1_callers: bool) -> bool:
    """Whether an engine that starts now gets a key.

    `has_token`: neuron itself has a token, so its engines must not be open either. `carries_keys`: the caller that
    loads the model can send one. `v1_callers`: callers that cannot have used this neuron.
    """
    if mode != "auto":
        return mode == "always"
    return has_token or (carries_keys and not v1_callers)


class EngineKeys:
    """Makes the keys. Single owner of what is known of callers that speak only protocol v1; it outlives neuron in
    `path`, so that a restart does not lock them out."""

    def __init__(self, mode: KeyMode, *, has_token: bool, path: Path) -> None:
        self.v1_callers = False
        """A caller that speaks only protocol v1 has loaded a model or asked for an endpoint."""
        self._mode = mode
        self._has_token = has_token
        self._path = path
        self._warned: set[str] = set()

    @property
    def required(self) -> bool:
        """True when every engine gets a key, also when the caller cannot send it."""
        return gets_key(self._mode, has_token=self._has_token, carries_keys=False, v1_callers=True)

    @property
    def sender_is_trusted(self) -> bool:
        """True when every caller has sent neuron's token."""
        return self._has_token

    async def read(self) -> None:
        """What an earlier neuron knew."""
        self.v1_callers = await asyncio.to_thread(self._path.exists)
        if self._mode == "never" and self._has_token:
            log.warning(
                'engine_keys is "never": engines serve everyone who can reach their ports, although neuron has a '
                'token. Set engine_keys = "auto" unless a cortex that speaks only protocol v1 needs these engines'
            )

    def new_key(self, *, carries_keys: bool) -> str | None:
        """A key for an engine that starts now; None for one without."""
        wanted = gets_key(self._mode, has_token=self._has_token, carries_keys=carries_keys, v1_callers=self.v1_callers)
        return secrets.token_urlsafe(32) if wanted else None

    def adopt(self, engine: str, api_key: str | None) -> None:
        """An engine of an earlier neuron keeps the key that it has, or none."""
        if api_key is None and self.required:
            log.warning(
                "%s: its engine was started without a key and keeps serving everyone until it is loaded again", engine
            )

    async def met_v1_caller(self, model_id: str) -> None:
        """A caller that speaks only protocol v1 loads the model or asks for its endpoint."""
        if not self.v1_callers:
            self.v1_callers = True
            with contextlib.suppress(OSError):  # a full disk: the next neuron learns it again
                await asyncio.to_thread(replace_file, self._path, b"")
            if self._mode == "auto" and not self._has_token:
                log.info("a cortex that speaks only protocol v1 uses this neuron: engines get no key from now on")
        if self.required and model_id not in self._warned:
            self._warned.add(model_id)
            reason = 'engine_keys is "always"' if self._mode == "always" else "neuron has a token"
            log.warning(
                "%s: a caller that speaks only protocol v1 asks for it. Its engine has a key, because %s. If that "
                'caller is a cortex, each request that it forwards gets 401: set engine_keys = "never" in neuron.toml',
                model_id,
                reason,
            )
