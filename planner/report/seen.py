"""The attention mask of a config in figures: the share of all pairs that it keeps, its reach and mass, and
the cells of a picture of it. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from attention.config import AttentionConfig
from attention.errors import ConfigError
from attention.layout_cells import COUNTED, row_counts, row_permitted, shares, taken, units
from attention.sizes.arrays import Floats
from planner.workload import Workload, refuse_features

if TYPE_CHECKING:
    from planner.quality.profiles import Profile

MAXIMUM_LAYERS: Final = 256
"""Layers up to which reach is computed."""
MAXIMUM_TOKENS: Final = 1 << 26
MAXIMUM_BRANCHES: Final = 12
POSITIONS: Final = 64
"""Positions at the beginning of a segment that a picture shows."""


class Seen(NamedTuple):
    """The (query, key) pairs that a config keeps of a sequence, in figures."""

    config: AttentionConfig
    workload: Workload
    """The sequence: its length, the tokens that ask, its documents, causality and number of heads count
    here."""
    size: int
    """Tokens of a unit. A unit is a block; a token for `dilated`, whose figures are those of head 0, and for
    windows that end at the token."""
    units: int
    minimum: int
    """The fewest units that a row keeps; `mean` and `maximum` likewise."""
    mean: float
    maximum: int
    exact: bool
    """Whether all rows were counted; otherwise a sample of them was."""
    layers: int | None
    """Reach: the layers after which the last token can depend on every token that causality permits. None if
    that takes more than MAXIMUM_LAYERS, and for `adaptive`, whose reach is not known before it runs."""
    mass: float | None
    """The share of dense attention's softmax probability that is kept, 0 to 1. None for `adaptive`, whose
    blocks are chosen at run time."""
    profile: str
    visible: float
    """The units that a row is permitted on average: those of its document, and before it if causal."""

    @property
    def first(self) -> int:
        """The first token that asks."""
        return self.workload.seq - self.workload.query_tokens

    @property
    def rows(self) -> int:
        """Units in which a token asks."""
        return self.units - self.first // self.size

    @property
    def chosen(self) -> bool:
        """Whether the blocks are chosen at run time, so that only their number is known."""
        return self.config.variant == "adaptive"

    @property
    def share(self) -> float:
        """The kept share of all pairs of units, 0 to 1."""
        return self.mean / self.units

    @property
    def permitted(self) -> float:
        """The kept share of the pairs that causality and documents permit, 0 to 1."""
        return self.mean / self.visible

    @property
    def by_head(self) -> bool:
        """Whether heads differ in what they keep, and these are head 0's figures."""
        return self.config.variant == "dilated"

    @property
    def unit(self) -> str:
        return "token" if self.config.variant == "dilated" or self.config.token_edges else "block"


def seen(config: AttentionConfig, workload: Workload, profile: Profile) -> Seen:
    """The figures of a config's mask; ConfigError if there are too many tokens or branches for a picture."""
    _refuse_vast(config, workload.seq)
    if config.variant == "adaptive":
        return _chosen(config, workload, profile)
    from planner.quality.mass import mass_of
    from planner.quality.reach import layers

    refuse_features(config, workload)
    size, number = units(config, workload.seq)
    counts = row_counts(config, workload.seq, workload.causal, **_sections(workload))
    visible = row_permitted(config, workload.seq, workload.causal, **_sections(workload))
    return Seen(
        config,
        workload,
        size,
        number,
        int(counts.min()),
        float(counts.mean()),
        int(counts.max()),
        number - (workload.seq - workload.query_tokens) // size <= COUNTED,
        layers(config, workload, MAXIMUM_LAYERS),
        mass_of(config, workload, profile),
        profile.name,
        _mean_visible(visible, number, workload),
    )


def _sections(workload: Workload) -> dict[str, Any]:
    """What is clipped, as `attention.layout_cells` takes it."""
    return {"origin": workload.seq - workload.query_tokens, "lengths": workload.documents or ()}


def _mean_visible(visible: Any, number: int, workload: Workload) -> float:
    if workload.is_cut:
        return float(visible.mean())
    return (number + 1) / 2 if workload.causal else float(number)


def _refuse_vast(config: AttentionConfig, seq: int) -> None:
    if seq > MAXIMUM_TOKENS:
        raise ConfigError(
            f"a layout is pictured over at most {MAXIMUM_TOKENS:,} tokens, got {seq:,}; pass e.g. --seq 1M"
        )
    if len(config.branches) > MAXIMUM_BRANCHES:
        raise ConfigError(
            f"a layout is pictured of at most {MAXIMUM_BRANCHES} branches, got {len(config.branches)}"
        )


def _chosen(config: AttentionConfig, workload: Workload, profile: Profile) -> Seen:
    from attention.layout import row_budget

    assert config.pattern is not None
    size = config.pattern.block_size
    number = -(-workload.seq // size)
    kept = min(row_budget(config, workload.seq), number)
    # Row i of a causal one has i + 1 blocks to choose from.
    mean = kept * (1 - (kept - 1) / (2 * number)) if workload.causal else float(kept)
    minimum = 1 if workload.causal else kept
    refuse_features(config, workload)
    visible = _mean_visible(None, number, workload)
    return Seen(config, workload, size, number, minimum, mean, kept, True, None, None, profile.name, visible)


def cells(mask: Seen, rows: int, columns: int) -> Floats:
    """The kept share of each cell's pairs, [rows, columns], with no more rows or columns than units."""
    workload = mask.workload
    return shares(mask.config, workload.seq, workload.causal, rows, columns, **_sections(workload))


class Strip(NamedTuple):
    """The positions that some heads attend to in a dilated branch, at the beginning of a segment."""

    length: int
    rate: int
    heads: tuple[int, ...]
    positions: tuple[bool, ...]
    """Whether each of the first positions of a segment is among them."""


def strips(mask: Seen, groups: int = 4) -> list[Strip]:
    """The strips of the first `groups` kinds of heads in each branch of a dilated config; none of others."""
    drawn = []
    for length, rate in mask.config.branches if mask.config.variant == "dilated" else ():
        length = min(length, mask.workload.seq)
        heads = range(min(mask.workload.heads, 1 << 10))
        for first in range(min(rate, len(heads), groups)):
            positions = np.zeros(min(length, POSITIONS), bool)
            positions[taken(len(positions), rate, first)] = True
            drawn.append(Strip(length, rate, tuple(heads[first::rate]), tuple(positions.tolist())))
    return drawn


def seen_data(mask: Seen) -> dict[str, Any]:
    """The figures as plain data."""
    workload = mask.workload
    given = {"queries": workload.queries, "documents": workload.documents}
    return {
        "config": mask.config.model_dump(mode="json"),
        "seq": workload.seq,
        "causal": workload.causal,
        **{name: value for name, value in given.items() if value is not None},
        "unit": mask.unit,
        "unit_tokens": mask.size,
        "units": mask.units,
        "kept": {"least": mask.minimum, "mean": mask.mean, "most": mask.maximum, "exact": mask.exact},
        "share": mask.share,
        "share_of_permitted": mask.permitted,
        "chosen_at_run_time": mask.chosen,
        "layers": mask.layers,
        "mass": mask.mass,
        "profile": mask.profile,
    }
