"""Who sees whom, in figures: what a config keeps of all pairs, how far that carries, and the cells of a
picture of it. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from attention.config import AttentionConfig
from attention.errors import ConfigError
from attention.layout_cells import COUNTED, row_counts, shares, taken, units
from attention.sizes.arrays import Floats
from planner.workload import Workload

if TYPE_CHECKING:
    from planner.quality.profiles import Profile

MOST_LAYERS: Final = 256
"""Reach is looked for up to so many."""
MOST_TOKENS: Final = 1 << 26
MOST_BRANCHES: Final = 12
POSITIONS: Final = 64
"""First positions of a segment that are shown."""


class Seen(NamedTuple):
    """What a config keeps of a sequence's pairs."""

    config: AttentionConfig
    workload: Workload
    """Of which the length, causality and heads count."""
    size: int
    """Tokens a unit: a block, or of dilated, of which the figures are those of one head, a token."""
    units: int
    least: int
    """Units that a row keeps."""
    mean: float
    most: int
    exact: bool
    """Whether every row was counted, not a sample."""
    layers: int | None
    """Until the last token has heard of all; None if not within MOST_LAYERS. Of adaptive none is known."""
    mass: float | None
    """Share of dense attention's; of adaptive, whose blocks are chosen at run time, none is known."""
    profile: str

    @property
    def chosen(self) -> bool:
        """Whether the blocks are chosen at run time, and only how many is known."""
        return self.config.variant == "adaptive"

    @property
    def share(self) -> float:
        """Of all pairs of units."""
        return self.mean / self.units

    @property
    def permitted(self) -> float:
        """Of those that causality permits."""
        return 2 * self.mean / (self.units + 1) if self.workload.causal else self.share

    @property
    def unit(self) -> str:
        return "token" if self.config.variant == "dilated" else "block"


def seen(config: AttentionConfig, workload: Workload, profile: Profile) -> Seen:
    """The figures; ConfigError where there are too many tokens or branches for a picture."""
    _refuse_vast(config, workload.seq)
    if config.variant == "adaptive":
        return _chosen(config, workload, profile)
    from planner.quality.mass import mass_of
    from planner.quality.reach import layers

    size, number = units(config, workload.seq)
    counts = row_counts(config, workload.seq, workload.causal)
    return Seen(
        config,
        workload,
        size,
        number,
        int(counts.min()),
        float(counts.mean()),
        int(counts.max()),
        number <= COUNTED,
        layers(config, workload, MOST_LAYERS),
        mass_of(config, workload, profile),
        profile.name,
    )


def _refuse_vast(config: AttentionConfig, seq: int) -> None:
    if seq > MOST_TOKENS:
        raise ConfigError(
            f"a layout is pictured over at most {MOST_TOKENS:,} tokens, got {seq:,}; pass e.g. --seq 1M"
        )
    if len(config.branches) > MOST_BRANCHES:
        raise ConfigError(
            f"a layout is pictured of at most {MOST_BRANCHES} branches, got {len(config.branches)}"
        )


def _chosen(config: AttentionConfig, workload: Workload, profile: Profile) -> Seen:
    from attention.layout import row_budget

    assert config.pattern is not None
    size = config.pattern.block_size
    number = -(-workload.seq // size)
    kept = min(row_budget(config, workload.seq), number)
    # Row i of a causal one has i + 1 blocks to choose from.
    mean = kept * (1 - (kept - 1) / (2 * number)) if workload.causal else float(kept)
    least = 1 if workload.causal else kept
    return Seen(config, workload, size, number, least, mean, kept, True, None, None, profile.name)


def cells(found: Seen, rows: int, columns: int) -> Floats:
    """[rows, columns], no more than there are units: the share of each cell's pairs that is kept."""
    return shares(found.config, found.workload.seq, found.workload.causal, rows, columns)


class Strip(NamedTuple):
    """The positions that some heads take in a dilated branch, at the beginning of a segment."""

    length: int
    rate: int
    heads: tuple[int, ...]
    positions: tuple[bool, ...]
    """Of the first positions of a segment, whether they are taken."""


def strips(found: Seen, groups: int = 4) -> list[Strip]:
    """Of a dilated config's branches the first `groups` kinds of heads; of others nothing."""
    drawn = []
    for length, rate in found.config.branches if found.config.variant == "dilated" else ():
        length = min(length, found.workload.seq)
        heads = range(min(found.workload.heads, 1 << 10))
        for first in range(min(rate, len(heads), groups)):
            positions = np.zeros(min(length, POSITIONS), bool)
            positions[taken(len(positions), rate, first)] = True
            drawn.append(Strip(length, rate, tuple(heads[first::rate]), tuple(positions.tolist())))
    return drawn


def seen_data(found: Seen) -> dict[str, Any]:
    """The figures as plain data."""
    workload = found.workload
    return {
        "config": found.config.model_dump(mode="json"),
        "seq": workload.seq,
        "causal": workload.causal,
        "unit": found.unit,
        "unit_tokens": found.size,
        "units": found.units,
        "kept": {"least": found.least, "mean": found.mean, "most": found.most, "exact": found.exact},
        "share": found.share,
        "share_of_permitted": found.permitted,
        "chosen_at_run_time": found.chosen,
        "layers": found.layers,
        "mass": found.mass,
        "profile": found.profile,
    }
