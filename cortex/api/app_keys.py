"""Keys under which handlers find what they need in their aiohttp app. `cortex.app` fills them in."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from cortex.accounts.keys.key_ring import KeyRing
from cortex.accounts.sign_in.sign_in import SignIn
from cortex.accounts.storage import Storage
from cortex.accounts.usage.reports import UsageReports
from cortex.config.live import LiveConfig
from cortex.control.loads.adapters import AdapterLoads
from cortex.control.loads.loader import Loader
from cortex.control.reload import Reloader
from cortex.control.scheduler import Scheduler
from cortex.control.shutdown import Shutdown
from cortex.fleet.members.decisions import Decisions
from cortex.fleet.members.registrations import Registrations
from cortex.fleet.neuron_client import NeuronClient
from cortex.fleet.state import Fleet
from cortex.fleet.timeline.timeline import Timeline
from cortex.metrics.exporter import Metrics
from cortex.metrics.requests.history import RequestHistory
from cortex.metrics.worker_counts import CountTotals

LIVE = web.AppKey("live", LiveConfig)
CLIENTS: web.AppKey[Mapping[str, NeuronClient]] = web.AppKey("clients")
"""By the name of the neuron."""
FLEET = web.AppKey("fleet", Fleet)
DECISIONS = web.AppKey("decisions", Decisions)
SCHEDULER = web.AppKey("scheduler", Scheduler)
ADAPTERS = web.AppKey("adapters", AdapterLoads)
LOADER = web.AppKey("loader", Loader)
COUNTS = web.AppKey("counts", CountTotals)
METRICS = web.AppKey("metrics", Metrics)
SHUTDOWN = web.AppKey("shutdown", Shutdown)
KEYS = web.AppKey("keys", KeyRing)
REQUESTS = web.AppKey("requests", RequestHistory)
TIMELINE = web.AppKey("timeline", Timeline)
RELOADER: web.AppKey[Reloader | None] = web.AppKey("reloader")
SIGN_IN: web.AppKey[SignIn | None] = web.AppKey("sign_in")
REGISTRATIONS: web.AppKey[Registrations | None] = web.AppKey("registrations")
"""None unless neurons announce themselves."""
STORAGE = web.AppKey("storage", Storage)
USAGE_REPORTS = web.AppKey("usage_reports", UsageReports)
CREATED = web.AppKey("created", int)
"""When cortex started, in Unix time."""
