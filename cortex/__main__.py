"""The `cortex` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cortex.cli.commands import app
from shared.terminal.command_line import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status."""
    return run_command(app, "cortex", argv)


if __name__ == "__main__":
    sys.exit(main())
