"""What NCCL takes of a card, outside of torch's allocator. Imports no torch."""

from __future__ import annotations

from typing import Final, NamedTuple

from planner.ranks.links import SLOT_CHANNELS, Network

MB: Final = 10**6
PAIR: Final = 544 * MB
"""A communicator of two cards, of 4 A100 joined by NVLink."""
GROUP: Final = 688 * MB
"""One of more."""
FIRST: Final = 1600 * MB
"""The most that was seen for a first communicator, before messages to single peers."""
RINGS: Final = 24
"""Channels of those communicators, to which memory is proportional: two an NVLink."""
SLOT_RINGS: Final = 4
"""Of one without NVLink at most: one or two, doubled."""
CHANNEL: Final = 3280 * MB // (7 * 32)
"""Of a channel to one peer: what 8 H100 took more after their first all-to-all, over 32 channels a pair."""
NETWORK_CHANNELS: Final = 4
"""To each peer at most where some are reached over a network, which then holds for all."""
MOST_PEERS: Final = 15
"""Those of two nodes of 8, beyond which memory does not grow."""
SOURCE: Final = (
    "seen elsewhere: on NVLink 544 MB for 2 GPUs and 688 MB for more (nccl#964), 1.6 GB (nccl#864), and 3.28 "
    "GB more after the first all-to-all of 8 H100, over 32 channels a pair (nccl#1685), of which there are 2 "
    "without NVLink; memory is proportional to channels (nccl#986)"
)
LESS: Final = "NCCL_MAX_P2P_NCHANNELS and NCCL_BUFFSIZE make it less"


class NcclShare(NamedTuple):
    """Bytes of one communicator on a card."""

    likely: int
    most: int
    """What an upper bound allows for."""
    source: str


NONE: Final = NcclShare(0, 0, SOURCE)
"""That of a card which shares nothing."""


def nccl_share(gpus: int, peers: int, network: Network) -> NcclShare:
    """The share of a card in a group of so many, 2 or more, that exchanges with some of the others: what the
    communicator of all takes, which a first call opens, and at most the channels to each peer too."""
    rings = SLOT_RINGS if network.inside.channels == SLOT_CHANNELS else RINGS
    likely, first = (x * rings // RINGS for x in (PAIR if gpus == 2 else GROUP, FIRST))
    channels = network.inside.channels if network.between is None else NETWORK_CHANNELS
    most = max(first, likely + CHANNEL * channels * min(peers, MOST_PEERS))
    return NcclShare(likely, most, f"{SOURCE}; {LESS}: {likely // MB:,} to {most // MB:,} MB here")
