"""Where handlers find the engine."""

from __future__ import annotations

from aiohttp import web

from neuron.sim.engine.engine import Engine

ENGINE = web.AppKey("engine", Engine)
