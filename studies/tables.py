"""Writes the studies' tables into docs/: `python -m studies.tables`, or `--check` to only compare.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` and comes from committed data.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from studies.catalogue import QUESTIONS, study
from studies.records import load

DOCS = Path(__file__).parent.parent / "docs"
PLACE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = {table: (name, make) for name in QUESTIONS for table, make in study(name).tables.items()}
"""By name: the study whose data a table shows, and what makes it from the rows."""


def filled(text: str) -> str:
    """The text with every table as the data has it, for each kind of machine under the command that
    repeats it."""

    def replace(match: re.Match[str]) -> str:
        study, table = TABLES[match["name"]]
        parts = []
        for data in load(study):
            where = data["environment"]
            source = f"`{data['command']}`, {where['device']}, torch {where['torch']}, {where['date']}"
            parts += [table(data["rows"]), source]
        body = "\n\n".join(parts or ["Not measured yet."])
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return PLACE.sub(replace, text)


def main() -> int:
    stale = [path for path in sorted(DOCS.glob("*.md")) if filled(path.read_text()) != path.read_text()]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} differs from the data; run python -m studies.tables", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(filled(path.read_text()))
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
