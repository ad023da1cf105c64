"""An estimate as a protocol message and as a table. Pure."""

from __future__ import annotations

from neuron.estimate.result import Estimate
from shared.protocol import EstimateLine, EstimateOption, EstimateReply
from shared.terminal.tables import table


def reply_of(model: str, estimate: Estimate) -> EstimateReply:
    """The protocol message; `model` is the name in the request."""
    return EstimateReply(
        model=model,
        source=estimate.source,
        architecture=estimate.architecture or None,
        basis=estimate.basis,
        max_model_len=estimate.max_model_len,
        sequences=estimate.sequences,
        split_over=estimate.split_over,
        parallel=None if estimate.parallel.tensor_only else estimate.parallel,
        host_devices=estimate.host_devices,
        tensor_parallel=estimate.tensor_parallel,
        total_mb=estimate.total_mb,
        device_mb=estimate.per_device_mb(estimate.parallel.tensor),
        lines=[
            EstimateLine(what=line.what, device_mb=line.device_mb, total_mb=line.total_mb, how=line.how)
            for line in estimate.lines
        ],
        options=[
            EstimateOption(
                tensor_parallel=option.tensor_parallel,
                device_mb=option.device_mb,
                possible=option.possible,
                fits=option.fits,
                reason=option.reason,
            )
            for option in estimate.options
        ],
        notes=list(estimate.notes),
    )


def table_of(reply: EstimateReply) -> str:
    """Lines of text, each with a newline."""
    blocks = [_head(reply), _sum(reply), _options(reply), reply.notes]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _head(reply: EstimateReply) -> list[str]:
    split = "" if reply.parallel is None else f" ({reply.parallel})"
    length = f"{reply.sequences} sequence{'' if reply.sequences == 1 else 's'} of {reply.max_model_len:,} tokens"
    return [
        f"model    {reply.model}  ({reply.architecture or 'unknown architecture'})",
        f"weights  {reply.basis}",
        f"context  {length} at once, on {_devices(reply.split_over)}{split}",
    ]


def _sum(reply: EstimateReply) -> list[str]:
    split = reply.split_over > 1
    rows: list[tuple[str, ...]] = [("WHAT", "EACH", "ALL", "HOW") if split else ("WHAT", "MIB", "HOW")]
    for line in [*reply.lines, _total(reply)]:
        sizes = (line.device_mb, line.total_mb) if split else (line.total_mb,)
        rows.append((line.what, *("?" if size is None else f"{size:,}" for size in sizes), line.how))
    return [table(rows, right=set(range(1, len(rows[0]) - 1)))]


def _total(reply: EstimateReply) -> EstimateLine:
    missing = sum(line.total_mb is None for line in reply.lines)
    how = "MiB" if not missing else f"MiB, and {missing} unknown"
    return EstimateLine(what="total", device_mb=reply.device_mb, total_mb=reply.total_mb, how=how)


def _options(reply: EstimateReply) -> list[str]:
    lines, groups = [], 1 if reply.parallel is None else reply.parallel.tensor_groups
    for option in reply.options:
        text = f"{option.device_mb:>9,} MiB on each" if option.possible else f"{'impossible':>21}"
        said = "fits" if option.fits else option.reason or ""
        lines.append(f"{_devices(option.tensor_parallel * groups):>10}  {text}  {said}".rstrip())
    if not reply.host_devices:
        return [*lines, "This host has no GPU to compare with."]
    if reply.tensor_parallel is None:
        return [*lines, "It does not fit on this host's devices."]
    return [*lines, f"The smallest tensor-parallel size that fits here: {reply.tensor_parallel}"]


def _devices(count: int) -> str:
    return f"{count} device{'' if count == 1 else 's'}"
