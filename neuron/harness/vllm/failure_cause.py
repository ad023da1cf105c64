"""Whether an error of vLLM's is the host's doing or the model's. Seen with vLLM 0.32, or in its sources."""

from __future__ import annotations

import re

from shared.protocol import FailureCause

# What an argument parser complains of: the same on every host.
_ARGUMENTS = re.compile(r"unrecognized arguments: |argument \S+: |the following arguments are required: ")
# Looked for first: much that reads like the model's is said of what this host's devices can do.
_NODE = re.compile(
    r"out of memory|OutOfMemory|MemoryError|Cannot allocate memory"
    r"|Free memory on device|No available memory for the cache blocks|Available memory on node \d"
    r"|larger than the available KV cache memory"
    r"|CUDA (?:error|driver|version|unknown|initialization)|compiled with CUDA|CUDA-capable|cuda(?:Error|rt)|libcuda"
    r"|cuBLAS|CUBLAS|cuDNN|CUDNN|NVML|NCCL|nccl|NVIDIA driver|Failed to infer device type"
    r"|compute capability|not supported (?:for|on) (?:the )?current (?:GPU|platform)|NUMA nodes"
    r"|No space left on device|Disk quota exceeded|Read-only file system|Input/output error|Stale file handle"
    r"|Too many open files|can't start new thread|Resource temporarily unavailable"
    r"|Address already in use|ImportError|ModuleNotFoundError|cannot open shared object file"
    # Its files are not in this host's cache, and the hub cannot be reached from it.
    r"|LocalEntryNotFoundError|OfflineMode|ConnectionError|ConnectTimeout|ReadTimeout|couldn't connect to"
    r"|Failed core proc\(s\): \{[^}]*: -9\b"  # the kernel's OOM killer took the core
)
_MODEL = re.compile(
    r"[Aa]rchitectures? .*not supported|does not recognize this architecture|has no vLLM implementation"
    r"|not supported in-tree|Unrecognized model in |should have a `model_type` key|No supported config format"
    r"|max_model_len \(\d+\) is greater than"
    r"|[Qq]uantization method|Cannot find the config file for "
    r"|Can't load tokenizer|Unable to load vocabulary|Couldn't instantiate the backend tokenizer"
    r"|must be divisible by tensor parallel size|trust_remote_code|Cannot find any model weights"
    r"|RepositoryNotFoundError|RevisionNotFoundError|RemoteEntryNotFoundError|HFValidationError"
    r"|not a valid model identifier|Invalid repository ID or local directory"
)


def cause_of(error: str, *, path_missing: bool) -> FailureCause:
    """Of an error as `vllm_log.root_cause` words it. `path_missing` True when the model is a path that this host does
    not have: another may."""
    if _ARGUMENTS.match(error):
        return FailureCause.MODEL
    if path_missing or _NODE.search(error):
        return FailureCause.NODE
    return FailureCause.MODEL if _MODEL.search(error) else FailureCause.UNKNOWN
