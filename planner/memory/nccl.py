"""What NCCL takes of a card, outside of torch's allocator. Imports no torch."""

from __future__ import annotations

from typing import Final, NamedTuple

MB: Final = 10**6
PAIR: Final = 544 * MB
"""Of a group of two cards."""
GROUP: Final = 688 * MB
"""Of a group of more."""
FIRST: Final = 1600 * MB
"""The most that was seen for a first communicator."""
EACH_PEER: Final = 3280 * MB // 7
"""What connections to a peer of the same machine took where all eight cards had each other as peers."""
NODE: Final = 8
"""Cards of a machine; those of others are reached by way of network adapters, with smaller buffers."""
SOURCE: Final = (
    "seen elsewhere: 544 MB for 2 GPUs and 688 MB for more (nccl#964), 1.6 GB (nccl#864), and 3.28 GB more "
    "after the first all-to-all of 8 H100 (nccl#1685); NCCL_MAX_P2P_NCHANNELS and NCCL_BUFFSIZE make it less"
)


class NcclShare(NamedTuple):
    """Bytes of one communicator on a card."""

    likely: int
    most: int
    """What an upper bound allows for."""
    source: str


def nccl_share(peers: int) -> NcclShare:
    """The share of a card that sends to, or hears from, so many others."""
    if not peers:
        return NcclShare(0, 0, SOURCE)
    likely = PAIR if peers == 1 else GROUP
    most = max(FIRST, GROUP + EACH_PEER * min(peers, NODE - 1))
    return NcclShare(likely, most, f"{SOURCE}: {likely // MB:,} to {most // MB:,} MB here")
