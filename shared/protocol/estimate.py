"""The GPU memory a model will need, estimated by a neuron from the model's files."""

from __future__ import annotations

from pydantic import Field

from shared.protocol.base import Mib, WireModel
from shared.protocol.parallel import Parallelism


class EstimateLine(WireModel):
    """One summand of an estimate. None: unknown, and not in the sum."""

    what: str
    device_mb: Mib | None = None  # on each device
    total_mb: Mib | None = None  # on all of them
    how: str = ""


class EstimateOption(WireModel):
    """The model with tensor groups of `tensor_parallel` devices. `reason`: why that is impossible or does not fit."""

    tensor_parallel: int
    device_mb: Mib = 0
    possible: bool = True
    fits: bool = False
    reason: str | None = None


class EstimateReply(WireModel):
    """Reply to `GET /estimate`.

    The lines and sums are for `split_over` devices, split as in `parallel` (None: by tensor parallelism alone);
    `tensor_parallel` is the smallest number of this host's devices that the model, or each of its stages, fits on,
    None if it does not fit.
    """

    model: str
    source: str | None = None
    architecture: str | None = None
    basis: str = ""  # source of the sizes of the weights
    max_model_len: int = 0
    sequences: int = 0
    split_over: int = 1
    parallel: Parallelism | None = None
    host_devices: int = 0  # usable ones
    tensor_parallel: int | None = None
    total_mb: Mib = 0
    device_mb: Mib = 0
    lines: list[EstimateLine] = Field(default_factory=list)
    options: list[EstimateOption] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
