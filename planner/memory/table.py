"""A memory plan is a table: what is allocated, how many bytes, and during which phases. Imports no torch.

Bytes are ints, or NumPy arrays for many candidates at once. The peak is the largest phase.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from attention.sizes.arrays import Count

if TYPE_CHECKING:
    import numpy as np

COMPONENTS: Final = (
    "qkv", "output", "gradients", "parameters", "saved_for_backward", "weights", "sparse_indices", "masks",
    "pattern_cache", "memory_pool", "workspace", "temp_buffers", "comm_buffers", "ring", "context",
)  # 15 families, a list of words  # fmt: skip
"""The families of the breakdown, as docs/design.md words them, in the order in which they are shown."""

START: Final = "inputs"
"""The phase in which only inputs and parameters are there."""


class Buffer(NamedTuple):
    """One line of a plan."""

    name: str
    component: str
    bytes: Count
    phases: tuple[str, ...]
    """Phases in which it is alive, in the plan's order; consecutive."""
    formula: str
    """How the bytes come about, in words."""
    tensors: tuple[Count, ...]
    """The bytes of each of the tensors that it consists of."""
    before: bool
    """Whether it was there before all that the call is given."""


class Plan(NamedTuple):
    """Phases in the order in which they come, and what is alive in them."""

    phases: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    again: tuple[tuple[int, int], ...] = ()
    """(first, one past the last) of phases that come more than once, one time after the other."""

    def totals(self) -> dict[str, Count]:
        """Bytes alive in each phase."""
        totals: dict[str, Count] = dict.fromkeys(self.phases, 0)
        for buffer in self.buffers:
            for phase in buffer.phases:
                totals[phase] = totals[phase] + buffer.bytes
        return totals

    def peak(self) -> tuple[str, int]:
        """The largest phase, the first of several, and its bytes; for ints."""
        totals = self.totals()
        phase = max(totals, key=lambda name: totals[name])
        return phase, int(totals[phase])

    def peaks(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Bytes of the largest phase of each candidate; for arrays."""
        import numpy as np

        totals = iter(self.totals().values())
        largest = np.asarray(next(totals), np.int64)
        for total in totals:
            largest = np.maximum(largest, total)
        return largest

    def components(self, phase: str) -> dict[str, int]:
        """Bytes of each component alive in a phase, those that have any, in the order of COMPONENTS."""
        by_component = dict.fromkeys(COMPONENTS, 0)
        for buffer in self.buffers:
            if phase in buffer.phases:
                by_component[buffer.component] += int(buffer.bytes)
        return {name: nbytes for name, nbytes in by_component.items() if nbytes}

    def events(self) -> Iterator[tuple[str, int | None]]:
        """(name, bytes) as a tensor is allocated and (name, None) as it is freed, in order. What comes more
        than once comes twice: the second time, all that was allocated the first time may have been split."""
        alive: list[Buffer] = []
        ordered = sorted(self.buffers, key=lambda buffer: not buffer.before)
        # Places of those that begin or end with a phase.
        edges: dict[str, set[int]] = {phase: set() for phase in self.phases}
        for place, buffer in enumerate(ordered):
            edges[buffer.phases[0]].add(place)
            edges[buffer.phases[-1]].add(place)

        def entered(phase: str, around: Sequence[str]) -> Iterator[tuple[str, int | None]]:
            """The events as a phase begins, of what begins or ends with the phases around it."""
            some = [ordered[place] for place in sorted(set().union(*(edges[name] for name in around)))]
            ended = (buffer for buffer in some if phase not in buffer.phases and buffer in alive)
            yield from _freed(sorted(ended, key=alive.index), alive)
            for buffer in some:
                if phase in buffer.phases and buffer not in alive and buffer.bytes:
                    alive.append(buffer)
                    yield from _tensors(buffer)

        for number, phase in enumerate(self.phases):
            yield from entered(phase, self.phases[max(number - 1, 0) : number + 1])
            for first, stop in self.again:
                if stop == number + 1:
                    repeated = self.phases[first:stop]
                    yield from _freed([b for b in alive if b.phases[0] in repeated], alive)
                    for name in repeated:
                        yield from entered(name, repeated)


class RankPlan(NamedTuple):
    """The plan of a rank, or of the only one."""

    plan: Plan
    peers: int
    """Ranks that it sends to or hears from."""


def _freed(buffers: Sequence[Buffer], alive: list[Buffer]) -> Iterator[tuple[str, None]]:
    """The events as these are freed, which are alive no longer."""
    for buffer in buffers:
        alive.remove(buffer)
        yield from ((name, None) for name, _ in _tensors(buffer))


Tensors = Count | Sequence[Count]
"""Bytes of one tensor, or of each of several."""


def _each(count: Tensors) -> tuple[Count, ...]:
    return tuple(count) if isinstance(count, (tuple, list)) else (count,)  # type: ignore[return-value]


def _tensors(buffer: Buffer) -> Iterator[tuple[str, int]]:
    """Names and bytes of a buffer's tensors."""
    for number, count in enumerate(buffer.tensors):
        if count:
            yield buffer.name if number == 0 else f"{buffer.name} ({number + 1})", int(count)


class PlanTable:
    """A plan in the making."""

    def __init__(self) -> None:
        self._phases: list[str] = [START]
        self._named: Counter[str] = Counter()
        self._lines: list[tuple[str, str, tuple[Count, ...], str, int, int | None]] = []
        self._open: dict[str, int] = {}
        self._before: set[int] = set()
        self._again: list[tuple[int, int]] = []

    def phase(self, name: str) -> None:
        """Begins a phase: buffers that are added from now on are alive from it on. A name that was there
        before gets a number."""
        self._named[name] += 1
        self._phases.append(self._numbered(name))

    def _numbered(self, name: str) -> str:
        """The last phase of a name."""
        count = self._named[name]
        return name if count == 1 else f"{name} ({count})"

    def again(self, name: str) -> None:
        """The phases from the last one of this name to the present one come more than once; what begins in
        them is freed in them."""
        self._again.append((self._phases.index(self._numbered(name)), len(self._phases)))

    def add(self, name: str, component: str, count: Tensors, formula: str) -> None:
        """A buffer that is alive from the present phase until it is freed, or to the end."""
        self._open[name] = len(self._lines)
        self._lines.append((name, component, _each(count), formula, len(self._phases) - 1, None))

    def lasting(self, name: str, component: str, count: Tensors, formula: str) -> None:
        """A buffer that is alive from its first use to the end: nothing where it is there already."""
        if all(line[0] != name for line in self._lines):
            self.add(name, component, count, formula)

    def kept(self, name: str, component: str, count: Tensors, formula: str) -> None:
        """A buffer that an earlier call left, alive from the start to the end."""
        self._before.add(len(self._lines))
        self._lines.append((name, component, _each(count), formula, 0, None))

    def free(self, *names: str) -> None:
        """The present phase is the last in which these are alive."""
        for name in names:
            place = self._open.pop(name)
            *line, _ = self._lines[place]
            self._lines[place] = (*line, len(self._phases))  # type: ignore[assignment]

    def rename(self, old: str, name: str, component: str) -> None:
        """A buffer becomes another one, of another component maybe."""
        place = self._open[name] = self._open.pop(old)
        self._lines[place] = (name, component, *self._lines[place][2:])

    def holds(self, name: str) -> bool:
        """Whether a buffer was added and not freed."""
        return name in self._open

    def free_held(self, *names: str) -> None:
        """`free` of those that are there."""
        self.free(*(name for name in names if self.holds(name)))

    def nbytes(self, name: str) -> Count:
        """Bytes of a buffer that was added and not freed."""
        return sum(self._lines[self._open[name]][2])

    def done(self) -> Plan:
        """The plan, without the lines that are zero whatever the candidate."""
        phases = tuple(self._phases)
        buffers = (
            Buffer(name, component, sum(tensors), phases[first:stop], formula, tensors, n in self._before)
            for n, (name, component, tensors, formula, first, stop) in enumerate(self._lines)
        )
        there = tuple(x for x in buffers if not (type(x.bytes) is int and x.bytes == 0))
        return Plan(phases, there, tuple(self._again))


KEPT: Final = ("memory_pool", "pattern_cache")
"""Components that a pass leaves behind, whoever needs its results."""


class PrefixedTable(PlanTable):
    """Adds the plan of a part of a call to a table, under names of its own."""

    def __init__(self, table: PlanTable, prefix: str) -> None:
        super().__init__()
        self._table, self._prefix = table, prefix
        self._alive: list[str] = []

    def phase(self, name: str) -> None:
        self._table.phase(self._prefix + name)

    def again(self, name: str) -> None:
        self._table.again(self._prefix + name)

    def add(self, name: str, component: str, count: Tensors, formula: str) -> None:
        self._table.add(self._prefix + name, component, count, formula)
        if component not in KEPT:
            self._alive.append(name)

    def lasting(self, name: str, component: str, count: Tensors, formula: str) -> None:
        self._table.lasting(name, component, count, formula)

    def kept(self, name: str, component: str, count: Tensors, formula: str) -> None:
        self._table.kept(name, component, count, formula)

    def free(self, *names: str) -> None:
        self._alive = [name for name in self._alive if name not in names]
        self._table.free(*(self._prefix + name for name in names))

    def rename(self, old: str, name: str, component: str) -> None:
        self._alive = [one for one in self._alive if one != old] + [name]
        self._table.rename(self._prefix + old, self._prefix + name, component)

    def holds(self, name: str) -> bool:
        return self._table.holds(self._prefix + name)

    def nbytes(self, name: str) -> Count:
        return self._table.nbytes(self._prefix + name)

    def end(self, *spared: str) -> None:
        """Frees all but these and what pool and caches keep."""
        self.free(*(name for name in self._alive if name not in spared))
