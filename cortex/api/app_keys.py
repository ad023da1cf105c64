"""Keys under which handlers find cortex's parts in their aiohttp app."""

from __future__ import annotations

from aiohttp import web

from cortex.control.wiring import Parts

PARTS = web.AppKey("parts", Parts)
