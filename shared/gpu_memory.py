"""The GPU memory an engine takes by default, and the margin kept free. cortex plans with both, neuron
reserves with both."""

from __future__ import annotations

from typing import Final

DEFAULT_ENGINE_SHARE: Final = 0.92
"""Fraction of each device that vLLM takes by default (`--gpu-memory-utilization` of 0.32), and must find free to start.
The rest is for the driver and for errors of an estimate."""
DEVICE_MARGIN_MB: Final = 512
"""MiB that neuron leaves unbooked on every real device: an engine's CUDA context, which vLLM does not count into its
fraction, and the few MiB by which NVML and CUDA disagree. Simulated devices have neither."""
