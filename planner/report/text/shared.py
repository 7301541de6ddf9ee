"""How GPUs share a call, in rows of text. Imports neither torch nor rich."""

from __future__ import annotations

from planner.answers.shared import SharedEstimate, SharedPass, Sharing
from planner.units import format_bytes


def ring_text(gpus: int, ring: int) -> str:
    """GPUs and rings in words: 8 GPUs; 8 GPUs in 2 rings of 4."""
    return f"{gpus:,} GPUs" + f" in {gpus // ring:,} rings of {ring:,}" * (ring < gpus)


def sharing_rows(estimate: SharedEstimate) -> list[tuple[str, str]]:
    """(what, its figures) of the ranks, links, bytes and seconds."""
    sharing, gpus = estimate.sharing, estimate.workload.gpus
    rings = f" in {gpus // sharing.ring:,} rings of {sharing.ring:,}" * (sharing.ring < gpus)
    held = f"up to {sharing.tokens:,} tokens each, {sharing.shards}; they exchange {sharing.exchange}"
    rows = [(f"{gpus:,} GPUs{rings}", held)] if not rings else [("GPUs", f"{gpus:,}{rings}: {held}")]
    rows.append(("link", f"{sharing.link}{f', nodes of {sharing.node}' if sharing.node else ''}"))
    rows.append(("", sharing.joined))
    passes = [("forward", sharing.forward)]
    if sharing.backward is not None:
        passes.append(("backward", sharing.backward))
    for number, (name, one) in enumerate(passes):
        traffic = f"{name} {format_bytes(one.sent)} sent, {format_bytes(one.received)} received"
        rows.append(("" if number else "traffic", f"{traffic}, at most, by a GPU"))
    if sharing.seconds is None:
        return [*rows, ("time", sharing.speed)]
    rows.append(("time", f"{time_text(sharing.seconds)}, of GPU {sharing.rank:,}, which takes longest"))
    rows += [("", f"{name} {_pass(one)}") for name, one in passes]
    return [*rows, ("", sharing.speed)]


def _pass(one: SharedPass) -> str:
    """Seconds of a pass, what is hidden and what exposed."""
    seconds, exchange, hidden, exposed = (
        time_text(figure or 0.0) for figure in (one.seconds, one.exchange, one.hidden, one.exposed)
    )
    return f"{seconds}: the exchange takes {exchange}, of which {hidden} are hidden and {exposed} exposed"


def exchanged(sharing: Sharing) -> str:
    """What a GPU does to exchange at most, and how much of the time that takes is hidden, in one line."""
    sent, received = traffic_of(sharing)
    line = f"sends up to {format_bytes(sent)}, receives {format_bytes(received)}"
    if sharing.seconds is None:
        return line
    passes = [one for one in (sharing.forward, sharing.backward) if one]
    hidden, exposed = (time_text(sum(getattr(one, name) for one in passes)) for name in ("hidden", "exposed"))
    return f"{line}: {hidden} hidden, {exposed} exposed"


def traffic_of(sharing: Sharing) -> tuple[int, int]:
    """Bytes that a GPU sends, and that it receives, at most, in both passes."""
    passes = [one for one in (sharing.forward, sharing.backward) if one]
    return sum(one.sent for one in passes), sum(one.received for one in passes)


def time_text(seconds: float) -> str:
    """Seconds for people: 1.25 s, 69.1 ms, 12 us, 0 s."""
    if not seconds:
        return "0 s"
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds / 1e-6:.3g} us"
