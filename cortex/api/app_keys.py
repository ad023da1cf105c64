"""How handlers reach the parts of cortex."""

from __future__ import annotations

from aiohttp import web

from cortex.control.wiring import Parts

PARTS = web.AppKey("parts", Parts)
