"""cortex's HTTP interface."""
