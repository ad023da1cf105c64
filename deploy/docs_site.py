"""A hook of MkDocs (mkdocs.yml): the documents at the top of the checkout become pages of the site, below `project/`.

Links are written for a git host, relative to the file; those between docs/ and the top are changed for the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

TOP = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LICENSE = "LICENSE"


def on_files(files: Files, *, config: Any) -> Files:
    for name in PAGES:
        files.append(File.generated(config, f"project/{name}", content=(TOP / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, f"project/{LICENSE}", abs_src_path=str(TOP / LICENSE)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    if page.file.src_uri.startswith("project/"):
        return re.sub(r"\]\(docs/", "](../", markdown)
    return re.sub(rf"\]\(\.\./({'|'.join(map(re.escape, PAGES))})", r"](project/\1", markdown)
