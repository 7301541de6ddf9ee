"""What a workload asks of an attention beside sizes, and whether a config takes it, as the library has it.
Imports no torch."""

from __future__ import annotations

from itertools import combinations

from attention.config import AttentionConfig
from attention.errors import ConfigError
from attention.features import NAMES, Feature, together, unfit_feature
from planner.workload import Workload


def features_of(workload: Workload) -> tuple[Feature, ...]:
    """The features that a workload has. One document is none."""
    there: dict[Feature, bool] = {
        "queries": workload.query_tokens < workload.seq,
        "documents": len(workload.documents or ()) > 1,
        "sinks": workload.sinks,
        "weights": workload.weights,
    }
    return tuple(feature for feature, given in there.items() if given)


def refuse_features(config: AttentionConfig, workload: Workload) -> None:
    """ConfigError where the config does not take what the workload has, or not together."""
    features = features_of(workload)
    for feature in features:
        why = unfit_feature(config, feature)
        if config.multihead and feature != "weights":
            why = "an attention between projections is given whole streams"
        if why:
            raise ConfigError(f"{NAMES[feature]}: not taken by this attention: {why}")
    for one, other in combinations(features, 2):
        if why := together(one, other):
            raise ConfigError(f"{NAMES[one]} and {NAMES[other]} do not go together: {why}")
