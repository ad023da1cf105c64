"""`cortex doctor`: checks a deployment from its files to an answer of a model, and says what to do about each fault.
Only `cortex.cli.commands` calls it."""
