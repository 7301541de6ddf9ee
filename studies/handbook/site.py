"""Builds the site into build/site: `python -m studies.handbook.site`. Needs the extra `docs`.

Pages go to build/pages first, as the site shows them: without remarks of this folder, pictures of studies in
their places, drawn from the committed data.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from studies.handbook.pages import DOCS, for_site, pictures
from studies.handbook.reader import ROOT

BUILD: Final = ROOT / "build"
SETTINGS: Final = DOCS / "site" / "zensical.toml"
FOLDER: Final = "pictures"


def prepare(pages: Path) -> None:
    """Empties the folder `pages` and writes the site's pages and pictures into it."""
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(DOCS, pages, ignore=shutil.ignore_patterns("site"))
    for page in pages.rglob("*.md"):
        folder = os.path.relpath(pages / FOLDER, page.parent)
        page.write_text(for_site(page.read_text(encoding="utf-8"), folder), encoding="utf-8")
    for name, content in pictures():
        (pages / FOLDER / name).write_bytes(content)


def main() -> int:
    prepare(BUILD / "pages")
    shutil.copy(SETTINGS, BUILD)  # Zensical takes the folder that its settings lie in for the project
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=BUILD, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
