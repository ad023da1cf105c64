"""How far the start of a vLLM is, from its output. Pure.

The patterns match vLLM 0.8 to 0.32 on GPUs and 0.32 on a CPU, and the hub's client, which vLLM downloads with. Steps
that print nothing belong to the phase before: building the model, and a download without progress bars (vLLM turns most
of them off), count as `starting`; profiling the memory counts as `compiling`, or as `warming up` without compilation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from neuron.harness.vllm.errors import lines_of
from neuron.progress.phases import CAPTURING, COMPILING, DOWNLOADING, LOADING, STARTING, WARMING_UP, rank

_MAX_MESSAGE = 200  # characters

# Of versions that do not name the process.
_BARE_RECORD = re.compile(r"^[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[?[\w.]+:\d+\] ")
_EAGER = re.compile(r"Enforce eager set|enforce_eager(?:=|': )True")
_TWO_CAPTURES = re.compile(r"CUDAGraphMode\.FULL_AND_PIECEWISE")

# `model-00001-of-00004.safetensors:  12%|█▏        | 598M/4.98G [00:03<00:25, 171MB/s]`: only weights count:
# configurations and tokenizers are small.
_FILE_BAR = re.compile(r"(?P<name>[\w.-]+\.(?:safetensors|bin|gguf|pth?))\]?:\s+(?P<percent>\d{1,3})%")
_FILES_BAR = re.compile(r"Fetching \d+ files:\s+(\d{1,3})%")
_FILE_COUNT = re.compile(r"-of-0*(\d+)")
_DOWNLOADED = re.compile(r"Time spent downloading weights for .*: (\d+(?:\.\d+)?) seconds")
_SHARDS_BAR = re.compile(r"[Ll]oading [^:]*(?:shards|loader|Streamer):\s+(\d{1,3})%")
_CAPTURE_BAR = re.compile(r"Capturing CUDA graph(?P<what>[^:]*):\s+(?P<percent>\d{1,3})%")

# Lines that announce a phase without its progress.
_MARKS = tuple(
    (re.compile(pattern), phase)
    for pattern, phase in (
        (r"Resolved architecture:|Initializing a V[01] LLM engine|Starting to load model", STARTING),
        (r"Initializing model took|Filesystem type for checkpoints", LOADING),
        (r"Using cache directory: .* for vLLM's torch\.compile|Dynamo bytecode transform time", COMPILING),
        (r"Cache the graph (?:of|for) |Compiling a graph for|Directly load (?:the compiled graph|AOT)", COMPILING),
        (r"torch\.compile (?:takes|took|and initial profiling)|Warming up model for the compilation", COMPILING),
        (r"Capturing cudagraphs for|Capturing the model for CUDA graphs", CAPTURING),
        (r"Graph capturing finished|init engine \(.*\) took", WARMING_UP),
    )
)
# The weights are loaded: compiling follows, unless it is switched off.
# A part of an engine with Ray says no more than that its node runs: what its workers say is in the output of rank 0.
_MODEL_LOADED = re.compile(
    r"Model loading took|Memory profiling takes|Available KV cache memory|KV cache size:|Ray runtime started"
)
_SERVING = re.compile(r"Starting vLLM (?:API )?server|Application startup complete")


@dataclass(frozen=True)
class VllmLoadReading:
    """See `LoadReading`. Several processes write at the same time: `fraction` is that of the furthest one, and a line
    of an earlier phase changes nothing."""

    phase: str = STARTING
    fraction: float | None = None
    message: str | None = None  # without its prefix
    serving: bool = False
    downloaded_secs: float | None = None
    eager: bool = False
    two_captures: bool = False  # graphs are captured in two passes with a bar each: PIECEWISE, then FULL
    files: Mapping[str, float] = field(default_factory=dict)  # weight files being downloaded -> fraction

    def after(self, line: str) -> VllmLoadReading:
        """The reading after one more line of output."""
        known = self
        for part in lines_of(line):
            known = known._after(_BARE_RECORD.sub("", part.text.strip()))
        return known

    def _after(self, text: str) -> VllmLoadReading:
        known = replace(
            self,
            eager=self.eager or _EAGER.search(text) is not None,
            two_captures=self.two_captures or _TWO_CAPTURES.search(text) is not None,
        )
        return known._download(text) or known._bar(text) or known._mark(text) or known

    def _download(self, text: str) -> VllmLoadReading | None:
        done = _DOWNLOADED.search(text)
        if done is not None:
            return replace(self, downloaded_secs=float(done[1]))._at(LOADING, None, text)
        together = _last(_FILES_BAR, text)
        if together is not None:
            return self._at(DOWNLOADING, int(together[1]) / 100, text)
        bar = _last(_FILE_BAR, text)
        if bar is None or rank(self.phase) > rank(DOWNLOADING):
            return None
        files = {**self.files, bar["name"]: int(bar["percent"]) / 100}
        counts = [int(count[1]) for count in map(_FILE_COUNT.search, files) if count is not None]
        return replace(self, files=files)._at(DOWNLOADING, sum(files.values()) / max([len(files), *counts]), text)

    def _bar(self, text: str) -> VllmLoadReading | None:
        shards = _last(_SHARDS_BAR, text)
        if shards is not None:
            return self._at(LOADING, int(shards[1]) / 100, text)
        graphs = _last(_CAPTURE_BAR, text)
        if graphs is None:
            return None
        fraction = int(graphs["percent"]) / 100
        if self.two_captures and "PIECEWISE" in graphs["what"]:
            fraction /= 2
        elif self.two_captures:
            fraction = 0.5 + fraction / 2
        return self._at(CAPTURING, fraction, text)

    def _mark(self, text: str) -> VllmLoadReading | None:
        if _SERVING.search(text):
            return replace(self, serving=True)._at(WARMING_UP, None, text)
        if "Loading weights took" in text:
            return self._at(LOADING, 1.0, text)
        if _MODEL_LOADED.search(text):
            return self._at(WARMING_UP if self.eager else COMPILING, None, text)
        phase = next((phase for pattern, phase in _MARKS if pattern.search(text)), None)
        return None if phase is None else self._at(phase, None, text)

    def _at(self, phase: str, fraction: float | None, text: str) -> VllmLoadReading:
        if rank(phase) < rank(self.phase):
            return self
        if fraction is not None:
            fraction = min(fraction, 1.0)
        if phase == self.phase and self.fraction is not None:
            fraction = self.fraction if fraction is None else max(self.fraction, fraction)
        return replace(self, phase=phase, fraction=fraction, message=text[:_MAX_MESSAGE])


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match: several states of a bar may be on one line, if redrawing got lost."""
    return next(reversed(list(pattern.finditer(text))), None)
