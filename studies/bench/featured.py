"""Random workloads with what running models need: fewer queries than keys, documents, learned sinks."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Final

from attention.config import AttentionConfig
from attention.features import Feature, unfit_feature
from planner.workload import Workload

MOST_DOCUMENTS: Final = 12


def featured(config: AttentionConfig, workload: Workload, rng: random.Random) -> Workload:
    """The workload with one to three features that the attention takes, without weights: queries from one to
    all, log-uniform, documents of random lengths, sinks. One between projections stays as it is."""
    features: tuple[Feature, ...] = ("queries", "documents", "sinks")
    taken = [feature for feature in features if unfit_feature(config, feature) is None]
    if config.multihead is not None:
        return workload
    if workload.seq < 2:
        taken = [feature for feature in taken if feature == "sinks"]
    some = rng.sample(taken, rng.randint(1, len(taken))) if taken else []
    fields = workload.model_dump(exclude_defaults=True) | {"weights": False}
    if "queries" in some:
        fields["queries"] = int(math.exp(rng.uniform(0, math.log(workload.seq))))
    if "documents" in some:
        count = rng.randint(2, min(MOST_DOCUMENTS, workload.seq))
        edges = [0, *sorted(rng.sample(range(1, workload.seq), count - 1)), workload.seq]
        fields["documents"] = tuple(end - begin for begin, end in pairwise(edges))
    fields["sinks"] = "sinks" in some
    return Workload(**fields)
