"""Who calls, what they may use and what they have used: API keys, limits and usage.

`caller` is what the rest of cortex knows of a client. Workers only look callers up; the control owns the rest.
"""
