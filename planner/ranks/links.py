"""Links between GPUs: how long a message takes to begin, and how fast it goes then. Imports no torch.

The figures are in `planner/data/links.json`, each with its source. They are published ones to plan with: a
machine's own may be better, and are often worse.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from attention.errors import ConfigError
from planner.gpus import Gpu

_DATA: Final = Path(__file__).parents[1] / "data" / "links.json"
PLANNED: Final = "published figures, not measured here"
MEASURED: Final = "figures of one small machine"
SLOT_CHANNELS: Final = 2
"""Channels that NCCL opens to each peer without NVLink."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One kind of link as planning sees it."""

    key: str
    """Short name, as in `--link nvlink4`."""
    aliases: tuple[str, ...] = ()
    """Other names it goes by."""
    name: str
    alpha: float
    """Seconds that a rank's messages to one peer take to begin, those that are posted together."""
    alpha_source: str
    beta: float
    """Bytes a second and direction that a GPU gets."""
    beta_source: str
    collectives: float = 1.0
    """The share of `beta` that is left where all ranks exchange with all, packing among it."""
    channels: int = SLOT_CHANNELS
    """Those that NCCL opens to each peer for messages, where all cards are in one node."""

    @property
    def is_published(self) -> bool:
        """Whether the figures are others', or derived from those."""
        return not self.beta_source.startswith("measured")

    def seconds(self, peers: int, nbytes: float, *, all_to_all: bool = False) -> float:
        """Seconds of an exchange with so many peers, of so many bytes in the direction that has more."""
        beta = self.beta * (self.collectives if all_to_all else 1.0)
        return self.alpha * peers + nbytes / beta


class Network(NamedTuple):
    """How GPUs are joined: all alike, or those of a node by one link and nodes by another."""

    inside: Link
    between: Link | None = None
    """The link of GPUs in different nodes; None where all are joined alike."""
    node: int | None = None
    """GPUs of a node; None where all are joined alike."""
    is_given: bool = False
    """Whether somebody named the links, and they do not follow from the card."""

    def link(self, rank: int, peer: int) -> Link:
        """The link between two ranks, of consecutive ones in a node."""
        if self.between is None or self.node is None or rank // self.node == peer // self.node:
            return self.inside
        return self.between

    def __str__(self) -> str:
        if self.between is None:
            return self.inside.name
        return f"{self.inside.name}, in nodes of {self.node}; {self.between.name}, between them"


@cache
def known() -> tuple[Link, ...]:
    """All links of the data file."""
    return tuple(Link(**{**row, "aliases": tuple(row["aliases"])}) for row in _data()["links"])


def find(name: str) -> Link:
    """The link called `name`, by key or alias, whatever its case; ConfigError with the names that there
    are."""
    wanted = name.strip().lower()
    for link in known():
        if wanted in (link.key, *link.aliases):
            return link
    names = ", ".join(link.key for link in known())
    raise ConfigError(f"link {name.strip()[:60]!r} is not known; there are {names}")


def network_of(
    gpus: int, card: Literal["cpu"] | Gpu, link: str | None = None, node: int | None = None
) -> Network:
    """How so many GPUs are joined.

    `link`: `nvlink4` where all are joined alike, `nvlink4,ndr` for the link in nodes of `node` GPUs and that
    between nodes. None for what such cards usually have: NVLink where they have it, else the slot of their
    generation, and where they are more than a node, a network. ConfigError for links that are not known, and
    for nodes that do not share the GPUs evenly.
    """
    if link is None:
        if node is not None:
            raise ConfigError(
                f"node={node} is for two links, that of a node and that between nodes; name both, e.g. "
                "link='nvlink4,ndr'"
            )
        return _usual(gpus, card)
    links = [find(name) for name in link.split(",")]
    if len(links) > 2:
        raise ConfigError(
            f"link has at most two names, that of a node and that between nodes, got {link[:60]!r}"
        )
    if len(links) == 1:
        if node is not None:
            raise ConfigError(
                f"node={node} is for two links, that of a node and that between nodes; name both, e.g. "
                f"link='{links[0].key},ndr', or leave node out"
            )
        return Network(links[0], is_given=True)
    if node is None:
        raise ConfigError(
            f"two links, {link!r}, are those of a node and between nodes; give the GPUs of a node too, e.g. "
            "node=8"
        )
    if node < 1 or gpus % node:
        nodes = [n for n in range(1, min(gpus, 128) + 1) if gpus % n == 0]
        nearest = min(nodes, key=lambda n: abs(n - node))
        raise ConfigError(
            f"node must divide the GPUs, got node={node} and gpus={gpus}; use e.g. node={nearest}"
        )
    return Network(links[0], links[1], node, is_given=True)


def _usual(gpus: int, card: Literal["cpu"] | Gpu) -> Network:
    """What such cards usually have."""
    if isinstance(card, str):
        return Network(find("gloo"))
    rows = _data()
    usual = rows["cards"].get(card.key) or rows["slots"][card.architecture]
    if gpus <= usual["node"]:
        return Network(find(usual["link"]))
    # Nodes of equal size: as many GPUs of the usual one as share them evenly.
    return Network(find(usual["link"]), find(usual["network"]), math.gcd(gpus, usual["node"]))


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return data
