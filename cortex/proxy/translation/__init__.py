"""Requests in a dialect that an engine lacks, translated to chat completions and back. `cortex.proxy.gateway` creates
its handler for the paths that can be translated; an engine that has the path gets and gives bytes unchanged.

`interface.py` says what a translation is; each dialect has a package with its own, and a line in `dialects.py`."""
