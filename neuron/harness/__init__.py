"""Harnesses: how engines of one kind are started, what their output means, and how they sleep.

The rest of neuron knows an engine only through `base.Harness` and looks it up in `registry`. An engine with code has a
package of its own; `command` is for all others, which neuron.toml describes. `checks` validates configuration and load
commands against the registry.
"""
