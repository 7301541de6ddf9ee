"""Does what is recommended for GPUs fit? Random questions over the cards of `studies.bench.dry`; each answer
is run dry on a card whose memory is the budget, less what the answer leaves to others.

    python -m studies.bench.dry_fits rows.jsonl --count 200

measures what the file does not have yet, a row as its question ends, and prints the outcomes. `--publish`
makes the rows the data of `planner study fits` for cards.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any, Final

from planner import gpus, recommend
from planner.answers.recommendation import Recommendation
from planner.measuring.dry import PREFIX
from planner.measuring.measure import Measurement
from planner.measuring.server import Batch
from planner.memory.cuda_process import device_lines, total
from planner.question.space import Space
from planner.search.relax import NothingFitsError
from planner.workload import Workload
from studies.bench.dry import CARDS, publish, read_rows
from studies.bench.records import Row

SEED: Final = 11
QUESTIONS: Final = 200
MINIMUM, MAXIMUM = 2e9, 80e9
"""Bytes of the smallest and of the largest budget."""
TIMEOUT: Final = 600.0
FLEX_SHARE: Final = 0.25
"""Share of the questions whose answer may go by FlexAttention, which takes up to a minute to compile."""
MORE: Final = 1.05
"""A longest sequence is run too at so many times its tokens, which should run out."""


def question(number: int) -> dict[str, Any]:
    """The n-th question: arguments of `recommend`, and the `backend` of its space. By turns for speed, for
    the longest sequence and for quality, at a length that may fit. There is no gate on reach, and gates on
    mass are looser than by default: memory should decide. No float64: at such sizes it takes kernel calls by
    the 100,000."""
    rng = random.Random(f"{SEED} {number}")
    card = gpus.find(rng.choice(CARDS))
    most = min(MAXIMUM, float(card.usable_bytes))
    heads = rng.choice((1, 4, 8, 12, 16, 32))
    options: dict[str, Any] = {
        "vram": int(math.exp(rng.uniform(math.log(MINIMUM), math.log(most)))),
        "gpu": card.key,
        "batch": rng.choice((1, 1, 2, 4)),
        "heads": heads,
        "kv_heads": rng.choice((None, None, 1, max(heads // 4, 1))),
        "head_dim": rng.choice((32, 64, 64, 80, 128, 256)),
        "dtype": rng.choice(
            ("float16", "float16", "float32") + ("bfloat16",) * 2 * gpus.native_bfloat16(card)
        ),
        "mode": rng.choice(("inference", "training")),
        "causal": rng.random() < 0.5,
        "objective": ("speed", "seq", "quality")[number % 3],
        "layers": None,
        "min_mass": rng.choice((0.3, 0.5, 0.8)),
        "display": rng.choice(("headless", "headless", "desktop")),
        "backend": None if rng.random() < FLEX_SHARE else "sdpa",
    }
    if options["objective"] != "seq":
        sizes = {name: options[name] for name in ("batch", "heads", "kv_heads", "head_dim", "dtype")}
        token = Workload(seq=1, **sizes).floor * (2 if options["mode"] == "training" else 1)
        room = options["vram"] - _others(options) - _context(options)
        options["seq"] = max(int(room / token * rng.uniform(0.1, 0.95)), 1)
    return options


def _others(options: dict[str, Any]) -> int:
    """Bytes of a card that the display holds."""
    architecture = gpus.find(options["gpu"]).architecture
    return int(total(device_lines(architecture, display=options["display"]))) - _context(options)


def _context(options: dict[str, Any]) -> int:
    return int(total(device_lines(gpus.find(options["gpu"]).architecture)))


def question_row(options: dict[str, Any], batch: Batch) -> Row:
    """One question: what was recommended, how its run ended, what it took; of a longest sequence also how
    one ended that is longer by 5%."""
    row: Row = {
        "about": "dry",
        "asked": options,
        "objective": options["objective"],
        "budget": options["vram"],
    }
    try:
        space = Space(backend=options["backend"])
        asked = {name: value for name, value in options.items() if name != "backend"}
        answer: Recommendation = recommend(**asked, space=space)
    except NothingFitsError as error:
        return row | {"outcome": "nothing fits", "relaxations": list(error.relaxations)}
    others = _others(options)

    def run(workload: Workload) -> Measurement:
        # The stand-in takes the planned context out of the card's memory itself.
        card = PREFIX + options["gpu"]
        return batch.measure(answer.config, workload, card=card, cap_bytes=options["vram"] - others)

    found = run(answer.workload)
    row |= {
        "outcome": found.kind,
        "message": (found.message or "")[:300] or None,
        "config": answer.config.model_dump(mode="json", exclude_defaults=True),
        "seq": answer.workload.seq,
        "kernel": found.environment.kernel,
        "upper": answer.memory.upper,
        "allocated": found.allocated,
        "taken": None if found.device_peak is None else found.device_peak + others,
        "torch": found.environment.torch,
    }
    if options["objective"] == "seq":
        longer = run(answer.workload.model_copy(update={"seq": math.ceil(MORE * answer.workload.seq)}))
        row["longer"] = longer.kind
    return row


def sweep(path: Path, count: int) -> list[Row]:
    """The rows of the first `count` questions; those that the file does not have are asked, and their
    answers run."""
    rows = read_rows(path)
    there = {row["number"] for row in rows}
    missing = [number for number in range(count) if number not in there]
    if missing:  # without any, no CUDA build of torch is wanted
        with path.open("a") as file, Batch(PREFIX + CARDS[0], timeout=TIMEOUT) as batch:
            for number in missing:
                rows.append({"number": number, **question_row(question(number), batch)})
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
    return sorted(rows, key=lambda row: row["number"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", type=Path, help="file of rows, JSON lines")
    parser.add_argument("--count", type=int, default=0, help="questions to have (default: none more)")
    parser.add_argument("--publish", action="store_true", help="write them as the study's data")
    given = parser.parse_args()
    rows = sweep(given.rows, given.count)
    for row in rows:
        if row["outcome"] not in ("ok", "nothing fits") or row.get("longer", "oom") != "oom":
            print(row["number"], row["outcome"], row.get("longer"), row.get("message"), row["asked"])
    if given.publish:
        command = f"python -m studies.bench.dry_fits FILE --count {len(rows)} --publish"
        publish("fits", command, rows, [row["torch"] for row in rows if row.get("torch")])


if __name__ == "__main__":
    main()
