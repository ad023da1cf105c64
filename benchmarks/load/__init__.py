"""A load generator: keep-alive connections on one event loop, every answer checked."""
