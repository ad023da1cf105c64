"""Error codes: the `code` of every error body that cortex or neuron sends. Clients and cortex decide by them."""

from __future__ import annotations

from enum import Enum


class ErrorCode(str, Enum):
    """docs/api.md and docs/protocol.md say what each means and what to do about it."""

    ADAPTERS_FULL = "adapters_full"
    ADAPTER_FAILED = "adapter_failed"
    ALREADY_LOADED = "already_loaded"
    COLD_LOAD_FAILED = "cold_load_failed"
    CORTEX_STOPPING = "cortex_stopping"
    CUDA_UNAVAILABLE = "cuda_unavailable"
    ENDPOINT_UNRESOLVED = "endpoint_unresolved"
    ENGINE_KEY_REQUIRED = "engine_key_required"
    FORBIDDEN = "forbidden"
    GROUP_STARTING = "group_starting"
    GROUP_UNREACHABLE = "group_unreachable"
    INSUFFICIENT_RAM = "insufficient_ram"
    INSUFFICIENT_VRAM = "insufficient_vram"
    INTERNAL_ERROR = "internal_error"
    INVALID_API_KEY = "invalid_api_key"
    INVALID_REQUEST = "invalid_request"
    LOAD_CANCELLED = "load_cancelled"
    LOAD_FAILED = "load_failed"
    LOAD_IN_PROGRESS = "load_in_progress"
    LOAD_TIMEOUT = "load_timeout"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    MODEL_BUSY = "model_busy"
    MODEL_FILES_INVALID = "model_files_invalid"
    MODEL_FILES_NOT_FOUND = "model_files_not_found"
    MODEL_NOT_FOUND = "model_not_found"
    NEURON_STOPPING = "neuron_stopping"
    NEURON_UNAVAILABLE = "neuron_unavailable"
    NO_FEASIBLE_NEURON = "no_feasible_neuron"
    NO_FREE_PORT = "no_free_port"
    NO_HEALTHY_NEURONS = "no_healthy_neurons"
    NODE_NOT_FOUND = "node_not_found"
    NOT_FOUND = "not_found"
    RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
    REQUEST_TOO_LARGE = "request_too_large"
    SLEEP_FAILED = "sleep_failed"
    SLEEP_UNGUARDED = "sleep_unguarded"
    SLEEP_UNSUPPORTED = "sleep_unsupported"
    UNAVAILABLE = "unavailable"
    UNLOAD_FAILED = "unload_failed"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_LOST = "upstream_lost"
    UPSTREAM_UNREACHABLE = "upstream_unreachable"
    VRAM_NOT_RELEASED = "vram_not_released"
    WAITING_ROOM_FULL = "waiting_room_full"
    WAKE_FAILED = "wake_failed"

    def __str__(self) -> str:
        """The code itself: `str()` and f-strings of a mixed-in Enum differ between Python versions."""
        return str(self.value)
