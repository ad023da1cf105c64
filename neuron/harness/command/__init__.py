"""The harness of every engine for which neuron has no code: a table of neuron.toml describes it, alone or on top of a
preset. `neuron.harness.checks` reads and checks the table, `neuron.harness.registry` makes the harness from it."""
