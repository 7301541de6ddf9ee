"""How far are predictions of memory from measurements? The half of `planner study accuracy` about bytes.

Random configs and workloads that no calibration has seen, each measured in a process of its own, and
predicted by this project and by its peers: PyTorch's `MemTracker`, which runs the call, with real tensors
and with fake ones, and the arithmetic of inputs, outputs, parameters and their gradients.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby, islice
from statistics import median
from time import perf_counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from attention.pool import buffers_for
from planner.fitting.samples import KINDS, Sample, samples
from planner.measuring.call import call_of
from planner.measuring.server import Batch
from planner.memory.estimate import estimate
from studies.bench.featured import featured
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Results, Scope

SEED = 1009
"""The random seed, another than a calibration's."""
CASES, LONGEST = 1000, 131_072
FEATURED_SEED, FEATURED = 1013, "fewer queries, documents, sinks"
"""The seed, and the kind, of cases with what running models need: a fifth as many."""
PEERED = 300
"""The number of cases, from the first on, that peers predict too: with fake tensors one may take minutes."""
QUICK, QUICK_LONGEST = 24, 2048
"""Cases of a quick study, and tokens of the longest."""
TIMEOUT = 300.0
CPU = torch.device("cpu")


def arithmetic(sample: Sample) -> int:
    """Bytes of inputs, outputs and parameters, and in training of their gradients."""
    config, workload = sample
    numbers = 2 * workload.batch * workload.seq * (workload.heads + workload.groups) * workload.head_dim
    if config.multihead:
        parts = config.multihead
        numbers = 2 * workload.batch * workload.seq * parts.embed_dim
        numbers += 2 * parts.embed_dim * (parts.embed_dim + workload.groups * parts.head_dim)
    return numbers * workload.itemsize * (2 if workload.mode == "training" else 1)


def tracked(sample: Sample, device: torch.device = CPU) -> int:
    """`MemTracker`'s peak in bytes of a device, over a call with real tensors there."""
    config, workload = sample
    call = call_of(config, workload, device)
    call.start_cold()
    tracker = MemTracker()
    tracker.track_external(call.module, *call.inputs, *([] if call.grad is None else [call.grad]))
    try:
        with tracker:
            call()
    finally:
        buffers_for(config).release()
    peaks = tracker.get_tracker_snapshot("peak")
    return sum(int(parts["Total"]) for place, parts in peaks.items() if place.type == device.type)


def tracked_fake(sample: Sample) -> int:
    """`MemTracker`'s peak in bytes over a call with fake tensors, which have no memory."""
    with FakeTensorMode():
        return tracked(sample)


def ours(sample: Sample) -> int:
    return estimate(*sample, "cpu").allocated


PEERS: dict[str, Callable[[Sample], int]] = {
    "this project": ours,
    "MemTracker, real tensors": tracked,
    "MemTracker, fake tensors": tracked_fake,
    "inputs, outputs, gradients x type": arithmetic,
}


def case_row(kind: str, sample: Sample, batch: Batch, peered: bool) -> Row:
    """One sample, measured and predicted by all."""
    config, workload = sample
    measurement = batch.measure(config, workload)
    expected = estimate(config, workload, "cpu", threads=measurement.environment.threads)
    row: Row = {
        "about": "memory",
        "kind": kind,
        "config": config.model_dump(mode="json", exclude_defaults=True),
        "workload": workload.model_dump(mode="json", exclude_defaults=True),
        "mode": workload.mode,
        "outcome": measurement.kind,
        "message": measurement.message,
        "measured": measurement.allocated,
        "predicted": expected.allocated,
        "upper": expected.upper,
    }
    return row | {"peers": {name: _answer(peer, sample) for name, peer in PEERS.items() if peered}}


def _answer(peer: Callable[[Sample], int], sample: Sample) -> Row:
    """A peer's bytes and seconds, or why it has none."""
    begin = perf_counter()
    try:
        nbytes = peer(sample)
    except Exception as error:  # noqa: BLE001 -- that it cannot, and why, is what is asked
        return {"bytes": None, "why": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return {"bytes": nbytes, "seconds": perf_counter() - begin}


def errors_table(rows: list[Row]) -> str:
    """Markdown: the errors of predictions by kind and mode, and together."""
    rows = about_memory(rows)
    ordered = sorted(rows, key=lambda row: (row["kind"], row["mode"]))
    body = [
        [kind, mode, *_errors(list(group))]
        for (kind, mode), group in groupby(ordered, key=lambda row: (row["kind"], row["mode"]))
    ]
    return markdown(
        [*body, ["all", "", *_errors(rows)]],
        [
            "attention",
            "mode",
            "cases",
            "no figure",
            "median error",
            "95%",
            "worst",
            "most under",
            "within the bound",
            "bound / measured",
        ],
    )


def _errors(rows: Sequence[Row]) -> list[str]:
    good = [row for row in rows if row["outcome"] == "ok"]
    counts = [str(len(rows)), str(len(rows) - len(good))]
    if not good:
        return [*counts, "", "", "", "", "", ""]
    signed = [(row["predicted"] - row["measured"]) / row["measured"] for row in good]
    size = sorted(map(abs, signed))
    within = sum(row["measured"] <= row["upper"] for row in good)
    return [
        *counts,
        _percent(median(size)),
        _percent(size[-(-95 * len(size) // 100) - 1]),
        _percent(size[-1]),
        _percent(max(0.0, -min(signed))),
        str(within),
        f"{median(row['upper'] / row['measured'] for row in good):.4f}",
    ]


def peers_table(rows: list[Row]) -> str:
    """Markdown: the errors of this project and its peers, on the cases that were measured."""
    rows = about_memory(rows)
    good = [row for row in rows if row["outcome"] == "ok" and row["peers"]]
    return markdown(
        ([name, *_peer(name, good)] for name in PEERS),
        ["prediction by", "cases", "cannot", "median error", "worst", "under", "median seconds"],
    )


def _peer(name: str, rows: Iterable[Row]) -> list[str]:
    answers = [(row["peers"][name], row["measured"]) for row in rows]
    predictions = [
        (answer["bytes"], measured, answer["seconds"])
        for answer, measured in answers
        if answer["bytes"] is not None
    ]
    counts = [str(len(answers)), str(len(answers) - len(predictions))]
    if not predictions:
        return [*counts, "", "", "", ""]
    size = [abs(nbytes - measured) / measured for nbytes, measured, _ in predictions]
    under = sum(nbytes < measured for nbytes, measured, _ in predictions) / len(predictions)
    seconds = median(seconds for *_, seconds in predictions)
    return [*counts, _percent(median(size)), _percent(max(size)), f"{under:.1%}", f"{seconds:.4f}"]


def reasons_table(rows: list[Row]) -> str:
    """Markdown: why a peer has no prediction, and how often."""
    rows = about_memory(rows)
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, answer in row["peers"].items():
            if answer["bytes"] is None:
                counts[name, answer["why"]] = counts.get((name, answer["why"]), 0) + 1
    return markdown(
        ([name, count, why] for (name, why), count in counts.items()),
        ["prediction by", "cases", "why it cannot"],
    )


def _percent(share: float) -> str:
    return f"{share:.3%}"


def steps(scope: Scope) -> list[Job]:
    """The cases."""
    cases, longest, peered = (QUICK, QUICK_LONGEST, 8) if scope.quick else (CASES, LONGEST, PEERED)
    batch = scope.batch(timeout=TIMEOUT)
    drawn = islice(samples(SEED, longest=longest), cases)
    jobs: list[Job] = [
        (
            f"memory {n} {KINDS[n % len(KINDS)]}",
            partial(case_row, KINDS[n % len(KINDS)], sample, batch, n < peered),
        )
        for n, sample in enumerate(drawn)
    ]
    for n, (config, workload) in enumerate(islice(samples(FEATURED_SEED, longest=longest), cases // 5)):
        workload = featured(config, workload, random.Random(f"{FEATURED_SEED} {n}"))
        if not workload.is_plain:
            job = partial(case_row, FEATURED, Sample(config, workload), batch, peered=False)
            jobs.append((f"memory {n} {FEATURED}", job))
    return jobs


def about_memory(rows: Results) -> Results:
    """The rows of this half."""
    return [row for row in rows if row["about"] == "memory"]
