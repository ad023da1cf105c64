"""Requests in a dialect that an engine lacks, translated to chat completions and back. `cortex.proxy.gateway` uses its
handler for the paths that can be translated; an engine that has the path gets and gives bytes unchanged.

`interface.py` says what a translation is. Each dialect has a package, and a line in `dialects.py`."""
