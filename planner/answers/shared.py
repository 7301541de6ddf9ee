"""The estimate of a call that GPUs share: how they share it, what they exchange and how long that takes,
beside the memory of the one that needs most. Imports no torch, and NumPy only where something is shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from attention.config import Value
from attention.errors import ConfigError
from planner import gpus
from planner.calibration import Calibration
from planner.memory.estimate import MemoryEstimate, Texts, machine_of
from planner.ranks.links import MEASURED, PLANNED, Network, network_of
from planner.ranks.ring import refuse_sharing, ring_of, sharding_of

NOTES: Final = (
    "nobody has run several GPUs here: their seconds are predicted from those of one and from figures of the "
    "links; that an exchange slows the kernels that hide it is not among them",
)


class SharedPass(Value):
    """A forward or a backward pass of the rank that takes longest. Seconds are None where the speed of the
    device is not known."""

    seconds: float | None
    compute: float | None
    exchange: float | None
    """Seconds in which its links are busy."""
    hidden: float | None
    """Seconds of the exchange in which it computes."""
    exposed: float | None
    """Seconds in which it waits for the exchange."""
    sent: int
    """Bytes that a rank sends, of the one that sends most."""
    received: int
    """Bytes that a rank receives, of the one that receives most."""


class Sharing(Value):
    """How ranks share a call, and what follows from it."""

    ring: int
    """Ranks that share a sequence; where there are more, such rings are data-parallel to each other."""
    exchange: Literal["keys", "heads"]
    shards: Literal["contiguous", "zigzag"]
    tokens: int
    """Tokens of a sequence that a rank holds, of the one with most."""
    link: str
    """Short name of the link, or of that in a node and that between nodes."""
    node: int | None
    """GPUs of a node; None where all are joined alike."""
    joined: str
    """The links in words, and whether they were named or follow from the card."""
    rank: int
    """The rank that takes longest."""
    seconds: float | None
    """Of a warm call, in training with its backward."""
    forward: SharedPass
    backward: SharedPass | None
    speed: str
    """Where the seconds come from."""
    notes: Texts = ()
    """Remarks on these figures."""


class SharedEstimate(MemoryEstimate):
    """The memory of a call that GPUs share, of the one that needs most, and how they share it."""

    sharing: Sharing


def with_sharing(
    estimate: MemoryEstimate,
    device: str | gpus.Gpu,
    *,
    link: str | None = None,
    node: int | None = None,
    calibration: Calibration | None = None,
    threads: int | None = None,
) -> MemoryEstimate:
    """The estimate, of several GPUs with how they share the call.

    `device`, `calibration`, `threads`: as the estimate was made with. `link`, `node`: see
    `planner.ranks.links.network_of`; ConfigError where there is one GPU.
    """
    config, workload = estimate.config, estimate.workload
    if workload.gpus == 1:
        refuse_idle_links(link, node)
        return estimate
    refuse_sharing(config, workload)
    card: Any = gpus.find(device) if isinstance(device, str) and device != "cpu" else device
    network = network_of(workload.gpus, card, link, node)
    return shared_over(estimate, card, network, {"calibration": calibration, "threads": threads})


def shared_over(
    estimate: MemoryEstimate, card: Literal["cpu"] | gpus.Gpu, network: Network, options: Mapping[str, Any]
) -> SharedEstimate:
    """The estimate of several GPUs that a network joins, with how they share the call; `options`:
    calibration and threads."""
    sharing = _sharing(estimate, card, network, options)
    fields = {name: getattr(estimate, name) for name in MemoryEstimate.model_fields}
    return SharedEstimate(**fields, sharing=sharing)


def refuse_idle_links(link: str | None, node: int | None) -> None:
    """ConfigError where links are named and one GPU has none."""
    if link is not None or node is not None:
        raise ConfigError(
            f"{'link' if link is not None else 'node'} is for several GPUs, and the workload is of one; give "
            "it gpus, e.g. gpus=8, or leave link and node out"
        )


def _sharing(estimate: MemoryEstimate, card: Any, network: Network, options: Mapping[str, Any]) -> Sharing:
    from attention.sharding.shards import shards_of
    from planner.speed.rates import speed_rates_of
    from planner.speed.timeline import PassTime, longest_rank

    config, workload = estimate.config, estimate.workload
    ring = ring_of(config, workload)
    machine = machine_of(card, workload.dtype, options["threads"])
    notes = list(NOTES)
    try:
        rates = speed_rates_of(card, workload, options)
        rates.costs("forward", workload.dtype)
        speed = rates.source
    except ConfigError as error:
        rates, speed = None, f"not known: {error}"
    time = longest_rank(config, workload, machine, rates, network)
    if time.looked_at < ring.world:
        notes.append(
            f"of {ring.world:,} ranks {time.looked_at} were looked at: the first, the middle one and the "
            "last, those at the edge of a node, and the one that receives most"
        )

    def shared(one: PassTime, most: tuple[int, int]) -> SharedPass:
        seconds = {
            name: getattr(one, name) if rates else None
            for name in ("seconds", "compute", "exchange", "hidden", "exposed")
        }
        return SharedPass(**seconds, sent=most[0], received=most[1])

    links = [each.key for each in (network.inside, network.between) if each]
    planned = PLANNED if network.inside.is_published else MEASURED
    given = "as named" if network.is_given else "as such devices usually have"
    return Sharing(
        ring=ring.world,
        exchange=time.exchange,
        shards=sharding_of(config).shards,
        tokens=int(shards_of(config, workload.seq, ring.world).fullest),
        link=",".join(links),
        node=network.node,
        joined=f"{network}; {given}; {planned}",
        rank=time.rank,
        seconds=time.seconds if rates else None,
        forward=shared(time.forward, time.most[0]),
        backward=shared(time.backward, time.most[1]) if time.backward else None,
        speed=speed,
        notes=tuple(notes),
    )
