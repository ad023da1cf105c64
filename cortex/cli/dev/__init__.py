"""`cortex dev`: the whole stack on one machine, as real processes, without a GPU and without a config file. Only
`cortex.cli.commands` calls it."""
