"""The page of a run, in Markdown: the machine, what ran, what did not and why, and what the rows say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from studies.bench.records import OK, Row, markdown
from studies.gpu.results import PARTS, above_the_bound, bytes_summary, current, of_part, taken

MIB = 1 << 20


def page(content: Row) -> str:
    """The page of what a file has."""
    rows = current(content)
    parts = [
        f"# {content['environment']['device']}",
        _where(content),
        "## What ran",
        _counts(content, rows),
        _failures(rows),
        _missing(content),
        *_section("Checks against the oracle in float64", _checks(of_part(rows, "checks"))),
        *_section("Beside PyTorch's own attentions", _peers(of_part(rows, "peers"))),
        *_section("By length", _lengths(of_part(rows, "length"))),
        *_section("Bytes", _bytes(rows)),
        *_section("Calibration", _calibration(content["calibration"])),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _section(title: str, body: str) -> list[str]:
    return [f"## {title}", body] if body else []


def _where(content: Row) -> str:
    here = content["environment"]
    facts = {
        "command": f"`{content['command']}`",
        "compute capability": here["capability"],
        "multiprocessors": here.get("multiprocessors"),
        "memory": here["device_bytes"] and f"{here['device_bytes']:,} bytes",
        "power limit": here["power_limit"],
        "driver": here["driver"],
        "CUDA of torch": here["cuda"],
        "torch": here["torch"],
        "Python": here["python"],
        "system": f"{here['system']}, {here['cores']} cores",
        "version": f"{here['version']}, code {here['code']}",
        "sessions": "; ".join(
            f"{session['date']}: {session['rows']} rows in {session['minutes']:.1f} min"
            for session in content["sessions"]
        ),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)


def _counts(content: Row, rows: Sequence[Row]) -> str:
    missing = Counter(label.partition(":")[0] for label in content["missing"])
    stale = len(content["rows"]) - len(rows)
    ends = ("ok", "wrong", "oom", "refused")
    body = []
    for part in PARTS:
        mine = Counter(row["outcome"] for row in of_part(rows, part))
        failed = sum(mine.values()) - sum(mine[end] for end in ends)
        body.append([part, *(mine[end] for end in ends), failed, missing[part]])
    head = ["part", "ok", "wrong", "out of memory", "not for this device", "failed", "not reached"]
    table = markdown(body, head)
    note = f"\n\n{stale} more rows are of other code, torch or driver; they are made anew in their turn."
    return table + (note if stale else "")


def _failures(rows: Sequence[Row]) -> str:
    """What went wrong, each with its reason."""
    bad = [row for row in rows if row["outcome"] not in (OK, "oom", "refused")]
    if not bad:
        return "Nothing failed."
    lines = (f"- {row['part']}: {row['name']}: **{row['outcome']}**, {row.get('message', '')}" for row in bad)
    return "What failed:\n\n" + "\n".join(lines)


def _missing(content: Row) -> str:
    count = len(content["missing"])
    if not count:
        return "All of it ran."
    return f"Not reached: {count} rows, the first `{content['missing'][0]}`; the same command goes on there."


def _checks(rows: Sequence[Row]) -> str:
    """Each kernel's worst error beside what is allowed."""
    done = [row for row in rows if "errors" in row]
    if not done:
        return ""
    by_kernel: dict[str, list[Row]] = {}
    for row in done:
        by_kernel.setdefault(row["kernel"].partition(",")[0], []).append(row)

    def worst(row: Row) -> float:
        pairs = zip(row["errors"].values(), row["allowed"].values(), strict=True)
        return max(float(error / limit) for error, limit in pairs)

    body = []
    for kernel, mine in by_kernel.items():
        most = max(mine, key=worst)
        wrong = sum(row["outcome"] != OK for row in mine)
        body.append([kernel, len(mine), wrong, f"{worst(most):.2f}", most["name"]])
    return markdown(body, ["kernel", "cases", "wrong", "worst error / allowed", "of"])


def _peers(rows: Sequence[Row]) -> str:
    dense = [row for row in rows if row.get("kind") == "dense" and row["outcome"] == OK]
    names = list(dict.fromkeys(name for row in dense for name in row["ratios"] if name != "ours"))
    tables = []
    if dense:
        body = [
            [
                row["name"],
                f"{1e3 * row['seconds']['ours']:.3f}",
                *(f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "-" for name in names),
            ]
            for row in dense
        ]
        tables.append(
            "Medians; times as long as ours takes; `-`: it does not run.\n\n"
            + markdown(body, ["call", "ours, ms", *names])
        )
    sparse = [row for row in rows if "step" in row and row["outcome"] == OK]
    if sparse:
        body = [
            [
                row["pattern"],
                f"{row['seq']:,}",
                "compiled FlexAttention / ours" if row["step"] == "forward" else "step / forward",
                f"{row['ratio']:.2f}",
            ]
            for row in sparse
        ]
        tables.append(markdown(body, ["attention", "tokens", "median of", "ratio"]))
    return "\n\n".join(tables)


def _lengths(rows: Sequence[Row]) -> str:
    """Milliseconds and MiB above the inputs, by attention and length."""
    tables = []
    for mode in ("inference", "training"):
        mine = [row for row in rows if row["mode"] == mode]
        lengths = sorted({row["seq"] for row in mine})
        if not lengths:
            continue
        cells = {(row["attention"], row["seq"]): _cell(row) for row in mine}
        names = dict.fromkeys(row["attention"] for row in mine)
        body = [[name, *(cells.get((name, seq), "") for seq in lengths)] for name in names]
        head = [f"{mode}, ms (MiB above inputs)", *(f"{seq:,}" for seq in lengths)]
        tables.append(markdown(body, head))
    return "\n\n".join(tables)


def _cell(row: Row) -> str:
    if row["outcome"] != OK:
        return str(row["outcome"])
    return f"{1e3 * row['seconds']:.3g} ({row['peak'] / MIB:,.0f})"


def _bytes(rows: Sequence[Row]) -> str:
    """Predictions, and dry runs, beside what was measured."""
    sides = [
        ("predicted", bytes_summary([*of_part(rows, "memory"), *of_part(rows, "dry runs")], "predicted")),
        ("taken in a dry run", bytes_summary(of_part(rows, "dry runs"), "dry")),
    ]
    body = []
    for what, summary in sides:
        for name in ("allocated", "reserved"):
            if name in summary:
                told: dict[str, Any] = summary[name]
                body.append(
                    [
                        f"{name}, {what}",
                        summary["cases"],
                        f"{told['exact']:.0%}",
                        f"{told['within 1%']:.0%}",
                        f"{told['median']:.2%}",
                        f"{told['least']:+.2%}",
                        f"{told['most']:+.2%}",
                    ]
                )
    if not body:
        return ""
    above = above_the_bound([*of_part(rows, "memory"), *of_part(rows, "dry runs")])
    lines = [f"- {row['name']}: {taken(row):,} bytes, of {row['predicted']['upper']:,}" for row in above]
    bound = (
        "No run took more than its upper bound."
        if not above
        else "\n".join(["Above the upper bound:", "", *lines])
    )
    head = ["bytes", "runs", "exact", "within 1%", "median error", "most under", "most over"]
    dry = "" if of_part(rows, "dry runs") else "\n\nNo dry runs of a card like this one are recorded."
    return f"{markdown(body, head)}\n\n{bound}{dry}"


def _calibration(told: Row) -> str:
    if "none" in told:
        return f"None yet: {told['none']}."
    made = told["calibration"]
    worst = max(map(abs, made["errors"]))
    lines = [f"Bytes: {len(made['errors'])} held-out runs, at most {worst:.2%} off."]
    if made["speed"] is None:
        lines.append("Seconds: too few timed runs yet.")
    else:
        speed = made["speed"]
        errors = sorted(map(abs, speed["errors"]))
        lines.append(
            f"Seconds: fitted to {speed['fitted']} runs; of {len(errors)} held out, median error "
            f"{errors[len(errors) // 2]:.1%}, ninth decile {errors[int(0.9 * (len(errors) - 1))]:.1%}."
        )
    return "\n\n".join(lines)
