"""A choice of blocks for dry runs, where kernels do nothing and a scorer's choice would be garbage.

What an adaptive attention takes depends on how many blocks a row has and on which rows have the last one, so
that there has to be a choice that a scorer could make. Imports torch where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def spread(blocks: int, kept: int, causal: bool) -> torch.Tensor:
    """int64 [blocks, kept]: for each row its own block and others at even distances, ascending; under
    `causal` none that comes later, and -1 at the end where there are fewer."""
    import torch

    row, place = torch.arange(blocks)[:, None], torch.arange(kept)
    if not causal:
        return ((row + place * blocks // kept) % blocks).sort(-1).values
    there = (row + 1).clamp_max(kept)
    lists = (row - place * (row + 1) // there).masked_fill(place >= there, blocks)
    lists = lists.sort(-1).values
    return lists.masked_fill(lists == blocks, -1)


def choose_by_spread() -> None:
    """From now on adaptive attentions of this process score as they do and then take `spread`. Writing it
    takes no memory of the device."""
    import attention.adaptive as adaptive

    real = adaptive.chosen_blocks

    def chosen(q: torch.Tensor, k: torch.Tensor, *others: Any) -> torch.Tensor:
        blocks = real(q, k, *others)
        shape = others[2]
        return blocks.copy_(spread(*blocks.shape[2:], causal=bool(shape.causal)))

    adaptive.chosen_blocks = chosen
