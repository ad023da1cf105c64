"""What a run found: a table, the bars of acceptance, a plot."""
