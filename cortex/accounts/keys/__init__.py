"""API keys: what a key allows, where keys come from, and how a request's key is recognised.

The control process collects them from the database, a file and the environment. Workers only get a table of digests.
"""
