"""What MkDocs calls while it builds the site: pictures of the studies, drawn from their committed data."""

from __future__ import annotations

import posixpath
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's studies, not installed ones

from studies.handbook import pages

FOLDER = "pictures"


def on_files(files: Any, config: Any) -> Any:
    for name, content in pages.pictures():
        files.append(File.generated(config, f"{FOLDER}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    home = posixpath.dirname(page.file.src_uri)
    return pages.for_site(markdown, posixpath.relpath(FOLDER, home or "."))
