"""The `cortex` command: serving, checking, the development fleet, the simulator, and commands that talk to a running
cortex. Only `cortex.__main__` calls it."""
