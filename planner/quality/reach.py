"""Reach: after how many layers the last token can be influenced by every token that causality permits.

`layers(config, workload)` goes back from the last token: after one layer it has seen the keys that any head
lets it see, after two the keys of those, and so on. Heads are mixed between layers, and a token keeps what
it has (the residual). None: never. `reaches` asks it of many candidates, up to a number of layers.

Letters: `B` blocks, `i` a query block, `T` branches, `n` tokens. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from attention.config import AttentionConfig
from attention.sizes.arrays import Ints, row_blocks
from attention.sizes.window import window_blocks
from planner.configs import Columns, columns_of
from planner.documents import longest
from planner.quality.mass import KEPT, distinct, shape_of
from planner.quality.sampled_blocks import PatternRows
from planner.workload import Workload

Bools: TypeAlias = NDArray[np.bool_]

NEVER = 1 << 62
FEW = 4096
"""Tokens that are followed one by one."""


def layers(config: AttentionConfig, workload: Workload, within: int = NEVER) -> int | None:
    """Layers until the last of `workload.seq` tokens can be influenced by every permitted one; None if that
    does not happen within so many, by default if it never does. Of documents, whose tokens never meet, it is
    the last token of the longest one. That fewer tokens ask now changes nothing: those before them asked
    earlier.

    Adaptive: the blocks are chosen from what they hold, so no graph is fixed. Taken is the best of choices:
    each of `heads` chooses blocks of its own beside the row's, so that one layer multiplies what is seen by
    1 + heads x (kept - 1), and the least number of layers that can cover all blocks at once is given.
    """
    count = int(_layers(columns_of(config, workload.seq), workload, within)[0])
    return None if count > min(within, NEVER - 1) else count


def reaches(columns: Columns, workload: Workload, within: int) -> Bools:
    """[len(columns)]: whether `layers` of each candidate is at most `within`. Of `workload`, `causal` and
    `heads` are read; the length is `columns.seq`."""
    return _layers(columns, workload, within) <= within


def may_reach(columns: Columns, workload: Workload, within: int) -> Bools:
    """[len(columns)]: False for some of those for which `reaches` searches in vain, without a search."""
    if workload.documents is not None:
        columns, workload, _ = longest(columns, workload)
    if columns.pattern_type != "dilated_sparse":
        return np.ones(len(columns), np.bool_)
    untyped: Any = columns
    blocks = -(-untyped.seq // untyped.block_size)
    lengths = [length // untyped.block_size for length in untyped.lengths]
    budget: Any = row_blocks(untyped.sparsity_ratio, blocks)
    near = _near(blocks, budget, lengths, untyped.rates, within)
    return np.broadcast_to(near, len(columns))


def _near(blocks: Ints, budget: Ints, lengths: Sequence[Ints], rates: Sequence[Ints], within: int) -> Bools:
    """Whether `within` layers get from one end of the blocks to the other if each goes as far as it may: by
    as many steps of one branch as a row keeps blocks besides its own, within the branch's segment."""
    steps = [np.minimum(s - 1, (budget - 1) * r) for s, r in zip(lengths, rates, strict=True)]
    return np.asarray(np.maximum.reduce(steps) * float(within) >= blocks - 1)


def keyless(config: AttentionConfig) -> bool:
    """Whether some (query, head) has no key: only where a dilated config allows it, by uncovered="zero" and
    no branch of rate 1. In all others every query keeps itself, and so its own block."""
    return config.variant == "dilated" and 1 not in config.dilation_rates


def _layers(columns: Columns, workload: Workload, within: int) -> Ints:
    """[len(columns)], layers; NEVER, or any number beyond `within`, where there are more."""
    if workload.documents is not None:
        columns, workload, _ = longest(columns, workload)
        return np.broadcast_to(_layers(columns, workload, within), len(columns))
    if columns.variant == "dense":
        return np.ones(len(columns), np.int64)
    if columns.pattern_type in ("local_window", "global_local"):
        fields = (np.broadcast_to(np.asarray(field), len(columns)) for field in shape_of(columns))
        seq, size, window, shared = fields
        return _windows(seq, size, window, shared, workload.causal)
    table, back = distinct(columns)
    whole = [column.astype(np.int64) for column in table.T]
    count, causal = len(columns.lengths), workload.causal
    if columns.variant == "adaptive":
        counts = _chosen(whole[0], whole[1], table[:, KEPT], workload.heads)
    elif columns.variant == "dilated":
        counts = np.array(
            [
                _dilated(
                    row[0],
                    tuple(zip(row[1 : 1 + count], row[1 + count :], strict=True)),
                    causal,
                    workload.heads,
                    within,
                )
                for row in np.stack(whole, axis=1).tolist()
            ]
        )
    else:
        blocks = -(-whole[0] // whole[1])
        budget = np.asarray(row_blocks(table[:, KEPT], blocks))  # type: ignore[arg-type]
        lengths, rates = [s // whole[1] for s in whole[3 : 3 + count]], whole[3 + count :]
        counts = np.full(len(table), NEVER)
        for at in np.flatnonzero(_near(blocks, budget, lengths, rates, within)).tolist():
            branches = tuple((int(s[at]), int(r[at])) for s, r in zip(lengths, rates, strict=True))
            counts[at] = _dilated_sparse(int(blocks[at]), int(budget[at]), branches, causal, within)
    return counts[back]


def _chosen(seq: Ints, size: Ints, ratio: NDArray[np.float64], heads: int) -> Ints:
    blocks = -(-seq // size)
    kept = np.asarray(row_blocks(ratio, blocks))  # type: ignore[arg-type]
    wider = 1 + heads * (np.minimum(kept, blocks) - 1)
    counts, reached = np.ones_like(blocks), wider.copy()
    for _ in range(64):
        counts += (reached < blocks) & (kept < blocks)
        reached = np.minimum(reached * wider, 1 << 31)
    return np.where((kept == 1) & (blocks > 1), NEVER, np.where(kept >= blocks, 1, counts))


def _windows(seq: Ints, size: Ints, window: Ints, shared: Ints, causal: bool) -> Ints:
    """local_window and global_local.

    Causal, global tokens are seen by all but see only each other, so that the window has to walk back to
    them. Otherwise the last token sees a global one and that sees all. A block that is reached is reached by
    its last token too, which sees all of the block: counting blocks is counting tokens.
    """
    blocks = -(-seq // size)
    reach, head = window_blocks(window, shared, size, blocks, causal)
    gap = np.maximum(blocks - 1 - head, 0)  # blocks to walk over
    steps = np.where(reach > 0, -(-gap // np.maximum(reach, 1)), np.where(gap > 0, NEVER, 0))
    steps = np.maximum(steps, 1)
    return steps if causal else np.where(head > 0, np.minimum(steps, 2), steps)


def _apart(branches: tuple[tuple[int, int], ...], n: int) -> bool:
    """Whether segments nest in each other and all end before n: then nothing crosses the end of one."""
    lengths = sorted(s for s, _ in branches)
    return lengths[-1] < n and all(b % a == 0 for a, b in itertools.pairwise(lengths))


@lru_cache(maxsize=4096)
def _dilated_sparse(
    blocks: int, budget: int, branches: tuple[tuple[int, int], ...], causal: bool, within: int
) -> int:
    """Layers of dilated_sparse by a search over blocks; `branches` in blocks. A block that is reached is
    reached whole, as in `_windows`: rows are those of blocks, and the own block is among them."""
    if blocks == 1:
        return 1
    if budget == 1 or _apart(branches, blocks):
        return NEVER
    unique = dict.fromkeys((min(s, blocks), min(r, blocks)) for s, r in branches)
    pairs = np.array(list(unique), np.int64)
    chains = all(fine <= coarse and coarse % fine == 0 for fine, coarse in itertools.pairwise(pairs[:, 1]))
    rows = PatternRows(lengths=pairs[:, :1], rates=pairs[:, 1:], blocks=blocks, causal=causal, chains=chains)
    reached = np.zeros(blocks, np.bool_)
    fresh = np.array([blocks - 1])
    reached[fresh] = True
    for layer in range(1, min(within, blocks) + 1):
        now = reached.copy()
        for rate, left, right in zip(pairs[:, 1].tolist(), *rows.select(fresh, budget), strict=True):
            _mark(now, fresh, left, right, rate)
        fresh = np.flatnonzero(now & ~reached)
        reached = now
        if reached.all():
            return layer
        if not fresh.size:
            return NEVER
    return NEVER


def _mark(reached: Bools, at: Ints, left: Ints, right: Ints, rate: int) -> None:
    """Mark at - left, ..., at, ..., at + right in steps of `rate`: intervals of the places' classes by
    rest, laid one class after another and counted by what begins and ends."""
    size = -(-reached.size // rate) + 1
    place = at % rate * size + at // rate
    edges = np.bincount(place - left // rate, minlength=rate * size)
    edges -= np.bincount(place + right // rate + 1, minlength=rate * size)
    inside = (np.cumsum(edges) > 0).reshape(rate, size).T.ravel()
    reached |= inside[: reached.size]


def _is_shut(n: int, branches: tuple[tuple[int, int], ...], causal: bool, heads: int) -> bool:
    """Whether the last token never hears of some token at the end of a segment: if few hear of that at all,
    however many layers. Of most attentions with tokens out of reach these are such, and searching all tokens
    for that takes longest."""
    ends = {end for s, _ in branches for end in (s - 1, n // s * s - 1) if end < n - 1}
    return any(_hears_never(n - 1, end, n, branches, causal, heads) for end in ends)


def _hears_never(
    last: int, token: int, n: int, branches: tuple[tuple[int, int], ...], causal: bool, heads: int
) -> bool:
    """Whether `last` is not among those who hear of a token in any number of layers; False where those are
    more than FEW."""
    heard, fresh = {token}, [token]
    while fresh:
        at = fresh.pop()
        for length, rate in branches:
            begin = at // length * length
            rest = (at - begin) % rate
            if rest >= heads:
                continue  # no head takes it
            hearing = range(at if causal else begin + rest, min(begin + length, n), rate)
            if len(hearing) > FEW or last in hearing:
                return False
            new = [one for one in hearing if one not in heard]
            heard.update(new)
            fresh += new
            if len(heard) > FEW:
                return False
    return True


@lru_cache(maxsize=4096)
def _dilated(n: int, branches: tuple[tuple[int, int], ...], causal: bool, heads: int, within: int) -> int:
    """Layers of a dilated attention by a search over tokens: of each branch, segment and rest modulo the
    rate, all that is reached lies before the last token of it (causal), or is all of it. A rest that no head
    takes reaches nothing."""
    branches = tuple(dict.fromkeys((min(s, n), r) for s, r in branches))
    if _apart(branches, n) or _is_shut(n, branches, causal, heads):
        return NEVER
    reached = np.zeros(n, np.bool_)
    reached[-1] = True
    count = 1
    for layer in range(1, min(within, n) + 1):
        now = reached.copy()
        for length, rate in branches:
            whole = n // length * length
            _spread(now[:whole].reshape(-1, length), reached[:whole].reshape(-1, length), rate, heads, causal)
            if whole < n:
                _spread(now[None, whole:], reached[None, whole:], rate, heads, causal)
        reached, before, count = now, count, int(np.count_nonzero(now))
        if count == n:
            return layer
        if count == before:
            return NEVER
    return NEVER


def _spread(now: Bools, reached: Bools, rate: int, heads: int, causal: bool) -> None:
    """One branch's layer, in place in `now`, from the tokens that earlier layers `reached`; both [segments,
    length]."""
    segments, length = reached.shape
    rests = min(heads, rate)  # rests that some head takes
    if length % rate == 0:
        by_rest = (segments, -1, rate)
        _column(now.reshape(by_rest)[..., :rests], reached.reshape(by_rest)[..., :rests], causal)
        return
    for rest in range(min(rests, length)):
        _column(now[:, rest::rate, None], reached[:, rest::rate, None], causal)


def _column(now: Bools, reached: Bools, causal: bool) -> None:
    """[segments, steps, rests]: mark every step up to the last one reached, or all if any is. Most segments
    are not reached yet or reached whole, and are passed over."""
    partly = np.flatnonzero(reached.any(axis=(1, 2)) & ~now.all(axis=(1, 2)))
    reached = reached[partly]
    if causal:
        last = np.where(reached.any(axis=1), reached.shape[1] - reached[:, ::-1].argmax(axis=1), 0)
        now[partly] |= np.arange(reached.shape[1])[None, :, None] < last[:, None]
    else:
        now[partly] |= reached.any(axis=1, keepdims=True)
