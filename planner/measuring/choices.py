"""A choice of blocks for dry runs, where kernels do nothing and a scorer's choice would be garbage.

What an adaptive attention takes depends on how many blocks a row has and on which rows have the last one, so
that there has to be a choice that a scorer could make. Imports torch where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from attention.sizes.adaptive import Scorer
    from attention.sizes.shape import Shape


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
    from attention import adaptive
    from attention.ops.scorer import chosen_blocks

    def chosen(
        q: torch.Tensor,
        k: torch.Tensor,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        shape: Shape,
        sizes: Scorer,
    ) -> torch.Tensor:
        blocks = chosen_blocks(q, k, query_weight, key_weight, shape, sizes)
        return blocks.copy_(spread(blocks.shape[2], blocks.shape[3], bool(shape.causal)))

    setattr(adaptive, "chosen_blocks", chosen)  # noqa: B010 -- a name that the module does not export
