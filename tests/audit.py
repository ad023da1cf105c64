"""`make audit`: asks pip-audit for known vulnerabilities of the installed packages. Fails only if there are some, not
where the service cannot be reached."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

COMMAND = (
    *("-m", "pip_audit", "--local", "--skip-editable"),
    *("--progress-spinner", "off", "--format", "json", "--timeout", "10"),
)
LIMIT_SECS = 120


def report(output: str) -> tuple[list[str], int, int]:
    """One line for each vulnerability, how many packages were looked up, and how many could not be.

    Raises:
        ValueError: not pip-audit's JSON.
    """
    packages: list[dict[str, Any]] = json.loads(output)["dependencies"]
    known = [package for package in packages if "skip_reason" not in package]
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'none'}"
        for package in known
        for found in package["vulns"]
    ]
    return lines, len(known), len(packages) - len(known)


def main() -> int:
    """Prints what was found; the exit status."""
    try:
        done = subprocess.run(
            [sys.executable, *COMMAND], capture_output=True, text=True, check=False, timeout=LIMIT_SECS
        )
        lines, known, unknown = report(done.stdout)
    except (ValueError, LookupError, subprocess.TimeoutExpired):
        print("audit: the vulnerability service cannot be reached; nothing was checked")
        return 0
    print(f"audit: {known} packages checked, {unknown} unknown to the service, {len(lines)} vulnerabilities")
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
