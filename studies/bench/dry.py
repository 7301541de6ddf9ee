"""Are predictions for GPUs right? Random cases, each run dry on a card that is not there, beside what
`planner.estimate` says of it.

    python -m studies.bench.dry rows.jsonl --seed 1 --count 300

measures what the file does not have yet and says how far predictions are from all that it has. A row is
written as its case ends; predictions are made anew each time. With kernels that do nothing, a case costs
what its host code does, so that long sequences are as cheap as short ones.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import torch

from attention.config import AttentionConfig, Backend
from attention.errors import ConfigError
from planner import gpus
from planner.calibration import Domain
from planner.configs import columns_of
from planner.files import write_whole
from planner.fitting.samples import samples
from planner.measuring.dry import PREFIX
from planner.measuring.server import Batch
from planner.memory.dispatch import goes_apart
from planner.memory.dry_runs import FLOAT64, PATH, SEGMENT, SEGMENTS, Checked, DryCases, DryRuns
from planner.memory.estimate import MemoryEstimate, estimate, machine_of
from planner.standin.install import torch_for
from planner.standin.interpreter import interpreter
from planner.standin.zygote import Zygote
from planner.workload import Workload, features_of
from studies.bench import dry_ranks
from studies.bench.dry_ranks import shared
from studies.bench.featured import featured
from studies.bench.records import DATA, Row, as_json, environment, write

CARDS: Final = (
    "gtx1060", "gtx1080ti", "p100", "v100-sxm2-16gb", "v100-pcie-32gb", "rtx2060", "t4", "rtx3050", "rtx3090",
    "a30", "a100-sxm4-80gb", "rtx4060", "rtx4090", "l40s", "h100-pcie", "h100-sxm", "gh200", "rtx5070",
    "rtx5090", "b200",
)  # from Pascal to Blackwell, from 10 to 170 multiprocessors  # fmt: skip
LONGEST: Final = 1 << 20
HEAD_DIMS: Final = (8, 16, 24, 32, 40, 64, 64, 64, 80, 96, 100, 128, 128, 160, 192, 256)
BATCHES: Final = (1, 1, 2, 3, 4)
STEPS: Final = 1000
"""Kernel calls of a case, about; milliseconds each where kernels do nothing."""
FLOOR_SHARE: Final = 16
"""A case's q, k, v and out take at most one part in so many of the smallest card."""
LEAST_MARGIN: Final = 0.01
"""For what a few hundred cases have not shown."""
STEP: Final = 0.0025
"""The margin is a multiple of this share: the least that no case exceeds."""
FLEX_SHARE: Final = 0.25
"""Share of the block-sparse cases that may go by compiled FlexAttention, which takes seconds to compile."""
RANKS_SHORTEST: Final = 128
"""Tokens of a case that ranks share, at least."""
RANKS_TIMES: Final = 4
"""Such a case may have so many times the bytes, of which each rank has its share."""
RANKS_SECONDS: Final = 120.0
"""For all ranks of a case."""


MACHINE: Final = "cuda-dry"
"""The machine of a study's data, in the file's name."""


class DryCase(NamedTuple):
    """What to run, where."""

    config: AttentionConfig
    workload: Workload
    card: str


def cases(
    seed: int, *, flex: float = FLEX_SHARE, features: bool = False, ranks: bool = False
) -> Iterator[DryCase]:
    """Cases without end, the same for the same seed; of the block-sparse ones a share of `flex` may be by
    FlexAttention, the others are by SDPA. With `features` each has what running models need
    (`studies.bench.featured`); with `ranks` each is shared by some, by SDPA (`studies.bench.dry_ranks`)."""
    floor = min(gpus.find(card).usable_bytes for card in CARDS) // FLOOR_SHARE
    drawn = samples(
        seed,
        shortest=RANKS_SHORTEST if ranks else 1,
        longest=LONGEST,
        work=float("inf"),
        floor_bytes=floor * (RANKS_TIMES if ranks else 1),
        steps=STEPS,
        head_dims=HEAD_DIMS,
        batches=BATCHES,
    )
    for number, (config, workload) in enumerate(drawn):
        rng = random.Random(f"card {seed} {number}")
        card = rng.choice(CARDS)
        if workload.dtype == "bfloat16" and not gpus.native_bfloat16(gpus.find(card)):
            workload = workload.model_copy(update={"dtype": "float16"})
        backend: Backend = rng.choice(("auto", "flex")) if rng.random() < flex else "sdpa"
        if config.variant != "block_sparse" and backend == "flex":
            backend = "auto"
        if backend == "flex" and (
            "flex" not in gpus.backends(gpus.find(card), workload.dtype) or workload.weights
        ):
            backend = "auto"
        config = config.model_copy(update={"backend": backend})
        if ranks:
            rng = random.Random(f"ranks {seed} {number}")
            config, workload = shared(config.model_copy(update={"backend": "sdpa"}), workload, rng)
        elif features:
            workload = featured(config, workload, random.Random(f"features {seed} {number}"))
        yield DryCase(config, workload, card)


def goes_flex(case: DryCase) -> bool:
    """Whether a case is planned to go by compiled FlexAttention."""
    config, workload, card = case
    machine = machine_of(gpus.find(card), workload.dtype, None)
    columns = columns_of(config, workload.seq)
    return config.variant == "block_sparse" and bool(goes_apart(columns, workload, machine))


def _asked(case: DryCase) -> Row:
    """What a row says of its case."""
    return {
        "card": case.card,
        "config": case.config.model_dump(mode="json", exclude_defaults=True),
        "workload": case.workload.model_dump(mode="json", exclude_defaults=True),
    }


def measured(case: DryCase, batch: Batch) -> Row:
    """A case's row: what it is, and what its run took or how it failed."""
    found = batch.measure(case.config, case.workload, card=PREFIX + case.card)
    return {
        **_asked(case),
        "kind": found.kind,
        "message": (found.message or "")[:300],
        "kernel": found.environment.kernel,
        "allocated": found.allocated,
        "reserved": found.reserved,
        "device": found.device_peak,
        "warm": found.allocated_warm,
        "torch": (found.environment.torch or "").partition("+")[0],
    }


def measured_ranks(case: DryCase, zygote: Zygote) -> list[Row]:
    """A row of each rank of a case; one of how it failed."""
    sample = {
        "config": case.config.model_dump(mode="json"),
        "workload": case.workload.model_dump(mode="json"),
    }
    end = zygote.run(dry_ranks.__name__, "peaks", sample, gpu=gpus.find(case.card), timeout=RANKS_SECONDS)
    if end.kind != "ok":
        return [{**_asked(case), "kind": end.kind, "message": str(end.value)[-300:]}]
    return [
        {**_asked(case), "kind": "ok", "message": "", "rank": n, **row} for n, row in enumerate(end.value)
    ]


def case_of(row: Row) -> DryCase:
    return DryCase(AttentionConfig(**row["config"]), Workload(**row["workload"]), row["card"])


def predicted(case: DryCase, rank: int | None = None) -> MemoryEstimate:
    return estimate(case.config, case.workload, case.card, dry=True, rank=rank)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def publish(name: str, command: str, rows: Sequence[Row], versions: Iterable[str]) -> Path:
    """Makes rows, of runs with these versions of torch, a study's data for cards that were not there; the
    file."""
    path = DATA / f"{name}.{MACHINE}.json"
    here = environment(torch.device("cpu"))
    here |= {
        "device": f"{len(CARDS)} cards run dry",
        "torch": ", ".join(sorted(set(versions))),
        "threads": None,
    }
    write(path, as_json({"command": command, "environment": here, "rows": list(rows)}))
    return path


def sweep(
    path: Path,
    seed: int,
    count: int,
    *,
    flex: float = FLEX_SHARE,
    features: bool = False,
    ranks: bool = False,
) -> list[Row]:
    """The rows of the first `count` cases of a seed; those that the file does not have are measured and
    added to it. Cases that the library refuses to plan are rows of the kind `refused`."""
    rows = read_rows(path)
    there = {row["number"] for row in rows if row["seed"] == seed}
    drawn = enumerate(islice(cases(seed, flex=flex, features=features, ranks=ranks), count))
    missing = [(number, case) for number, case in drawn if number not in there]
    if not missing:  # no CUDA build of torch is wanted
        return rows
    with path.open("a") as file, _measuring(ranks) as measure:
        for number, case in missing:
            try:
                predicted(case)
                found = measure(case)
            except ConfigError as error:
                found = [{"card": case.card, "kind": "refused", "message": str(error)[:300]}]
            for row in found:
                rows.append({"seed": seed, "number": number, **row})
                file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    return rows


@contextmanager
def _measuring(ranks: bool) -> Iterator[Callable[[DryCase], list[Row]]]:
    """What measures cases, of one GPU or of ranks."""
    if ranks:
        build, ahead = torch_for(interpreter(sys.executable))
        with Zygote(gpus.find(CARDS[0]), torch=build, ahead=ahead) as zygote:
            yield lambda case: measured_ranks(case, zygote)
        return
    with Batch(PREFIX + CARDS[0]) as batch:
        yield lambda case: [measured(case, batch)]


class Error(NamedTuple):
    """How far a prediction is from a measurement. Relative ones are of predicted - measured."""

    row: Row
    case: DryCase
    predicted: MemoryEstimate
    allocated: float
    reserved: float
    missed: int
    """Bytes of reserved, predicted - measured."""
    upper: float
    """Upper bound over measured."""


def errors(rows: Iterable[Row]) -> list[Error]:
    """Of the rows that were measured."""
    found = []
    for row in rows:
        if row["kind"] != "ok":
            continue
        case = case_of(row)
        estimated = predicted(case, row.get("rank"))
        found.append(
            Error(
                row,
                case,
                estimated,
                estimated.allocated / row["allocated"] - 1,
                estimated.reserved / row["reserved"] - 1,
                estimated.reserved - row["reserved"],
                estimated.upper / row["device"],
            )
        )
    return found


def summary(found: Sequence[Error]) -> dict[str, Any]:
    """Shares within bounds, the worst, and the upper bound's tightness."""
    count = len(found)

    def share(within: Iterable[bool]) -> float:
        return sum(within) / count

    close = [abs(e.reserved) <= 0.01 or abs(e.missed) <= SEGMENT for e in found]
    return {
        "cases": count,
        "allocated exact": share(e.allocated == 0 for e in found),
        "allocated within 0.1%": share(abs(e.allocated) <= 0.001 for e in found),
        "allocated within 1%": share(abs(e.allocated) <= 0.01 for e in found),
        "allocated from": min(e.allocated for e in found),
        "allocated to": max(e.allocated for e in found),
        "reserved exact": share(e.missed == 0 for e in found),
        "reserved within 1% or a segment": share(close),
        "reserved from": min(e.reserved for e in found),
        "reserved to": max(e.reserved for e in found),
        "upper exceeded": sum(e.upper < 1 for e in found),
        "upper / measured, median": median(e.upper for e in found),
        "upper / measured, most": max(e.upper for e in found),
    }


class _Bound(NamedTuple):
    """What a case's answer is held to: ranks are held to that of the one that needs most."""

    seed: int
    reserved: int
    """Bytes measured."""
    taken: int
    """Those that the bound begins with: bytes predicted, in float64 some times as many."""


def _bounds(found: Sequence[Error]) -> list[_Bound]:
    cases: dict[tuple[int, int], list[Error]] = {}
    for e in found:
        cases.setdefault((e.row["seed"], e.row["number"]), []).append(e)
    return [
        _Bound(
            seed,
            max(e.row["reserved"] for e in ranks),
            max(e.row["reserved"] + e.missed for e in ranks)
            * (FLOAT64 if ranks[0].case.workload.dtype == "float64" else 1),
        )
        for (seed, _), ranks in cases.items()
    ]


def margin(found: Sequence[Error]) -> float:
    """The share of a prediction that is to be added to it, so that none of these cases is above it."""
    beyond = max((one.reserved - SEGMENTS * SEGMENT) / one.taken - 1 for one in _bounds(found))
    return max(math.ceil(beyond / STEP) * STEP, LEAST_MARGIN)


def checked(setting: Sequence[Error], checking: Sequence[Error]) -> Checked:
    """What `planner/data/dry-runs.json` has, of two sets of cases, each of one draw or several."""
    share = margin(setting)

    def draws(found: Sequence[Error]) -> tuple[DryCases, ...]:
        above: dict[int, list[bool]] = {}
        for one in _bounds(found):
            bound = one.taken * (1 + share) + SEGMENTS * SEGMENT
            above.setdefault(one.seed, []).append(one.reserved > bound)
        return tuple(
            DryCases(seed=seed, cases=len(cases), exceeded=sum(cases))
            for seed, cases in sorted(above.items())
        )

    def in_both(values: Callable[[Error], Iterable[str]]) -> tuple[str, ...]:
        one, other = ({value for e in found for value in values(e)} for found in (setting, checking))
        return tuple(sorted(one & other))

    return Checked(
        torch=checking[-1].row["torch"],
        cards=in_both(lambda e: (e.case.card,)),
        domain=Domain(
            variants=in_both(lambda e: (e.case.config.variant,)),
            dtypes=in_both(lambda e: (e.case.workload.dtype,)),
            modes=in_both(lambda e: (e.case.workload.mode,)),
            longest=LONGEST,
            features=in_both(lambda e: {*features_of(e.case.workload)} - {"weights"}),
            ranks=min(max(e.case.workload.gpus for e in found) for found in (setting, checking)),
        ),
        margin=share,
        set_by=draws(setting),
        checked_by=draws(checking),
    )


def write_runs(runs: Checked) -> None:
    """Puts the runs in the file, those of ranks beside those of one GPU that are there, or the other way."""
    there = DryRuns.from_json(PATH.read_bytes())
    if runs.domain.ranks > 1:
        made = there.model_copy(update={"ranks": runs})
    else:
        made = DryRuns(**dict(runs), ranks=there.ranks)
    write_whole(PATH, f"{made.to_json(indent=1)}\n".encode(), "the file")


def described(error: Error) -> str:
    """A line about one case."""
    config, workload, card = error.case
    what = (
        config.pattern.pattern_type if config.variant == "block_sparse" and config.pattern else config.variant
    )
    parts = [
        f"{error.allocated:+.2%} {error.reserved:+.2%} upper {error.upper:.3f}",
        card,
        what,
        workload.mode,
    ]
    parts += [workload.dtype, f"S{workload.seq} B{workload.batch} H{workload.heads}/{workload.groups}"]
    if config.sharding:
        rank, sharding = error.row.get("rank"), config.sharding
        parts += [f"rank {rank} of {workload.gpus}", sharding.exchange, sharding.shards, sharding.travel]
    parts += [f"D{workload.head_dim}", "causal" * workload.causal, "weights" * workload.weights]
    if config.multihead:
        parts += ["multihead", "bias" * config.multihead.bias, "checkpoint" * config.multihead.checkpoint]
    parts += ["flex" * goes_flex(error.case), f"pool {config.pool}", f"{error.row['allocated'] / 1e6:.1f} MB"]
    parts.append(f"#{error.row['seed']}.{error.row['number']}")
    return " ".join(part for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", type=Path, help="file of rows, JSON lines")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=0, help="cases of the seed to have (default: none more)")
    parser.add_argument("--flex", type=float, default=FLEX_SHARE, help="share that may go by FlexAttention")
    parser.add_argument(
        "--features", action="store_true", help="with fewer queries, documents and sinks among the cases"
    )
    parser.add_argument("--ranks", action="store_true", help="cases that ranks share, a row for each rank")
    parser.add_argument("--worst", type=int, default=20, help="cases to name")
    parser.add_argument(
        "--write", type=Path, nargs="+", help="files of rows of other seeds: write the margin that they set"
    )
    given = parser.parse_args()
    rows = sweep(
        given.rows, given.seed, given.count, flex=given.flex, features=given.features, ranks=given.ranks
    )
    if given.write:
        setting = errors(row for path in given.write for row in read_rows(path))
        if both := {e.row["seed"] for e in setting} & {row["seed"] for row in rows}:
            parser.error(f"rows that set a margin do not check it: {given.rows} has seeds {sorted(both)} too")
        write_runs(checked(setting, errors(rows)))
    found = errors(rows)
    for error in sorted(found, key=lambda e: -abs(e.allocated))[: given.worst]:
        print(described(error))
    print("reserved:")
    for error in sorted(found, key=lambda e: -abs(e.reserved))[: given.worst]:
        print(described(error))
    for name, figure in summary(found).items():
        print(f"{name:36} {figure:.4g}")
    for row in rows:
        if row["kind"] not in ("ok", "refused"):
            print(row["seed"], row["number"], row["card"], row["kind"], row["message"])


if __name__ == "__main__":
    main()
