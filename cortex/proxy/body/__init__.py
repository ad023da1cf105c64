"""Reads and edits request bodies as bytes: the `model` they name. Pure; called by the request handler."""
