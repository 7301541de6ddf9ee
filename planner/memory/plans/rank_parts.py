"""The memory plan of the parts of a rank that shares a sequence by moving keys, and of the sums that they are
added to; see `attention/sharding/sums.py` and `attention/sharding/part_calls.py`. Imports no torch.

Letters as in `planner/memory/plans/tiles.py`, of the rank's own tokens; R rows of L lanes of keys, Q queries
of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from attention.sharding.parts import Placement
from attention.sharding.plan import KeysPlan, Ranges, RankPart
from attention.sharding.whole_parts import WholePart, joining
from attention.sizes.arena import arena_bytes
from attention.sizes.shape import Shape
from attention.sizes.tiles import Extent, backward_sizes, forward_sizes
from attention.sizes.whole_calls import backward_cut
from planner.memory.plans import list_calls, tiles, whole_calls
from planner.memory.plans.kept_buffers import End, Kept
from planner.memory.plans.tiles import Case
from planner.memory.table import PlanTable, PrefixedTable

APART = 1 << 62
"""Numbers from one to the next of what is never in one piece."""


class RankCase(NamedTuple):
    """What the steps of a rank's plan need."""

    table: PlanTable
    case: Case
    """Of the rank's own tokens."""
    plan: KeysPlan
    kept: Kept
    extent: Callable[[RankPart, bool], Extent]
    """The largest sizes of a part's calls, forward or backward."""

    @property
    def e(self) -> int:
        return self.case.shape.itemsize

    @property
    def w(self) -> int:
        return self.case.shape.wide

    def rows(self, queries: int) -> int:
        """Queries of all batch items and heads."""
        return int(self.case.batch * queries * self.case.shape.heads)

    def numbers(self, queries: int) -> int:
        """Numbers of so many queries, or of their output."""
        return self.rows(queries) * int(self.case.shape.head_dim)

    def key_numbers(self, rows: int, lanes: int) -> int:
        """Numbers of so many rows of keys."""
        return int(self.case.batch * rows * lanes * self.case.shape.head_dim)

    def placed(self, rows: Placement) -> int:
        """Numbers of keys that lie so."""
        return self.key_numbers(rows.total, rows.lanes(self.plan.shape))

    @property
    def travel(self) -> int:
        """Bytes of a number of a gradient that travels."""
        return self.w if self.plan.travels_wide else self.e


class NumberLines:
    """Lines of `attention.sharding.sums`: numbers of tokens, some in single precision."""

    def __init__(
        self, rank: RankCase, tokens: int, each: int, wide: Ranges, name: str, component: str
    ) -> None:
        """`each`: numbers of a token of all batch items."""
        self._rank, self.tokens, self._each = rank, tokens, each
        self.name, self._component = name, component
        self._wide = wide if rank.e < rank.w else ()
        self.all_wide = self._wide == ((0, tokens),)
        self.is_begun = False

    @property
    def is_mixed(self) -> bool:
        """Whether some tokens alone are in single precision."""
        return bool(self._wide) and not self.all_wide

    @property
    def own(self) -> int:
        """Bytes of a number, but for what is in single precision beside others."""
        return self._rank.w if self.all_wide else self._rank.e

    @property
    def _wide_name(self) -> str:
        return f"{self.name} in single precision"

    def takes(self, tokens: int, number: int) -> bool:
        """Whether they may begin with so many tokens in numbers of so many bytes."""
        return not self.is_begun and tokens == self.tokens and number == self.own

    def begin(self, part: str | None = None) -> None:
        """Begins, with a part of that name, if nothing has begun."""
        table = self._rank.table
        if self.is_begun:
            return
        self.is_begun = True
        name = self._wide_name if self.all_wide else self.name
        component = "temp_buffers" if self.all_wide else self._component
        if part is None:
            formula = "B S H D w" if self.all_wide else "B S H D e"
            table.add(name, component, self.tokens * self._each * self.own, formula)
        else:
            table.rename(part, name, component)
        if self.is_mixed:
            table.phase(f"{self.name}, some of it in single precision")
            nbytes = [(end - begin) * self._each * self._rank.w for begin, end in self._wide]
            table.add(self._wide_name, "temp_buffers", nbytes, "B S H D w of some tokens")

    def end(self, number: int) -> None:
        """They are complete, and have numbers of so many bytes."""
        table = self._rank.table
        self.begin()
        if self.is_mixed:
            table.free(self._wide_name)
        if not self.all_wide:
            return
        if number == self.own:
            table.rename(self._wide_name, self.name, self._component)
            return
        table.phase(f"{self.name}, rounded")
        table.add(self.name, self._component, self.tokens * self._each * number, "B S H D e")
        table.free(self._wide_name)


class OutputLines:
    """Lines of `attention.sharding.sums.Output`."""

    def __init__(self, rank: RankCase, tokens: int, wide: Ranges, name: str, lse_name: str) -> None:
        self._rank, self._name, self._lse_name = rank, name, lse_name
        self._numbers = NumberLines(rank, tokens, rank.numbers(1), wide, name, self._component("output"))
        self.heads_first = False
        """Whether the log-sum-exp lies as kernels of whole calls return it."""

    def add(self, part: RankPart, name: str) -> None:
        """Adds a part, which is computed first."""
        rank, table = self._rank, self._rank.table
        if part.whole is not None:
            self._join(part.whole, f"{name}: ")
            return
        queries = part.queries.stop - part.queries.start
        out, lse = _part_forward(rank, part, f"{name}: ")
        if self._numbers.takes(queries, rank.e):
            self.heads_first = part.listed is not None and self._has_order
            self._begin(out, lse)
            return
        self.merge(queries)
        table.free(out, lse)
        table.phase(f"{name} merged")

    def _join(self, part: WholePart, prefix: str) -> None:
        """Adds a part of whole calls."""
        rank, calls = self._rank, part.calls
        table, case = PrefixedTable(rank.table, prefix), rank.case._replace(shape=part.shape, trains=False)
        self.heads_first |= self._has_order and not self._numbers.is_begun
        if self._numbers.takes(int(part.shape.queries), rank.e) and calls[0].covers(part.shape):
            whole_calls.forward(table, case, calls[:1])
            self._begin(f"{prefix}out", f"{prefix}log-sum-exp")
            calls = calls[1:]
        else:
            table.phase("before it is merged")
            self._begin()
        for call in joining(calls):
            whole_calls.forward_parts(table, case, call)
        table.phase("merged")

    @property
    def _has_order(self) -> bool:
        """Whether heads before tokens is another order than tokens before heads."""
        return bool(self._rank.case.shape.heads > 1 and self._numbers.tokens > 1)

    def merge(self, queries: int) -> None:
        """Merges the output of queries that is there."""
        rank, table = self._rank, self._rank.table
        table.phase(f"{self._name}, merging")
        self._begin()
        rows = min(rank.plan.slab_tokens, queries) * int(rank.case.shape.heads)
        share, slab = rows * rank.w, rows * int(rank.case.shape.head_dim) * rank.w
        total, part = slab * (self._numbers.own < rank.w), slab * (rank.e < rank.w)
        name = f"scratch of the merge, {self._name}"
        table.add(name, "workspace", (share, total, max(share, part)), "T H w, and twice T H D w in 16 bits")
        table.free(name)

    def end(self) -> None:
        """The sum is complete."""
        self._begin()
        self._numbers.end(self._rank.e)
        if self.heads_first and self._name != "out":  # it travels tokens before heads
            table = self._rank.table
            table.phase(f"{self._lse_name} in the order of out")
            table.rename(self._lse_name, f"{self._lse_name} of a kernel", "temp_buffers")
            self._add_lse()
            table.free(f"{self._lse_name} of a kernel")

    def _begin(self, out: str | None = None, lse: str | None = None) -> None:
        """Begins, with a part of these names, if nothing has begun."""
        numbers = self._numbers
        if numbers.is_begun:
            return
        numbers.begin(out)
        if lse is None:
            self._add_lse()
        else:
            self._rank.table.rename(lse, self._lse_name, self._component("saved_for_backward"))

    def _add_lse(self) -> None:
        nbytes = self._rank.rows(self._numbers.tokens) * self._rank.w
        self._rank.table.add(self._lse_name, self._component("saved_for_backward"), nbytes, "B S H w")

    def _component(self, own: str) -> str:
        """That of own results; visitors' travel."""
        if self._name != "out":
            return "comm_buffers"
        return own if own == "output" or self._rank.case.trains else "temp_buffers"


class SumLines:
    """Lines of `attention.sharding.sums.Sum`, of R rows and L lanes."""

    def __init__(
        self, rank: RankCase, name: str, rows: int, lanes: int, wide: Ranges, component: str
    ) -> None:
        self._rank, self._name, self._lanes = rank, name, lanes
        self.visits = component == "comm_buffers"
        """Whether it travels."""
        self.numbers = NumberLines(rank, rows, rank.key_numbers(1, lanes), wide, name, component)

    def add(self, part: str, rows: int, number: int) -> None:
        """Adds a part of that name, which is gone then."""
        if self.numbers.takes(rows, number):
            self.numbers.begin(part)
            return
        self.merge(rows, number)
        self._rank.table.free(part)

    def merge(self, rows: int, number: int, lane_tokens: int = 0) -> None:
        """Adds so many rows of a part that is there, or tokens of one lane at a time."""
        rank, table = self._rank, self._rank.table
        table.phase(f"{self._name}, adding")
        self.numbers.begin()
        slab = min(rank.plan.slab_tokens, rows) * self._lanes * int(rank.case.shape.head_dim)
        if not rows:
            slab = lane_tokens * int(rank.case.shape.head_dim)
        name = f"scratch of the sum, {self._name}"
        widens = number != self.numbers.own or self.numbers.is_mixed
        table.add(name, "workspace", slab * rank.w * widens, "T L D w")
        table.free(name)

    def end(self, number: int) -> None:
        """The sum is complete, and has numbers of so many bytes."""
        self.numbers.end(number)


def _part_forward(rank: RankCase, part: RankPart, prefix: str) -> tuple[str, str]:
    """Computes a part of tiles or of lists; names of its output and log-sum-exp."""
    table, case = PrefixedTable(rank.table, prefix), rank.case
    names = f"{prefix}out", f"{prefix}log-sum-exp"
    if part.listed is not None:
        list_calls.forward(table, case._replace(shape=part.listed.shape, trains=False), part.listed.calls)
        return names
    shape, queries = part.program.shape, part.queries.stop - part.queries.start
    extent = rank.extent(part, False)
    ends: list[End] = []

    def begin() -> None:
        table.add("out", "temp_buffers", rank.numbers(queries) * rank.e, "B Q H D e")
        table.add("log-sum-exp", "temp_buffers", rank.rows(queries) * rank.w, "B Q H w")
        forward, backward = _arenas(rank, part)
        formula = "attention/sizes/tiles.py forward_sizes"
        ends.append(rank.kept.begin(rank.table, forward, backward, int(shape.seq), formula))
        ends.append(rank.kept.mask(rank.table, (*_ints(extent.mask), extent.band, rank.e)))

    tiles.forward_calls(table, case._replace(shape=shape), extent, begin)
    for end in reversed(ends):
        end()
    return names


def _ints(pair: tuple[object, object]) -> tuple[int, int]:
    return int(pair[0]), int(pair[1])  # type: ignore[call-overload]


def _arenas(rank: RankCase, part: RankPart) -> tuple[int, int]:
    """Bytes that the forward pass and the backward pass of a part reserve."""
    shape: Shape = part.program.shape
    forward = int(arena_bytes(forward_sizes(rank.extent(part, False), shape, keeps_lse=True)))
    if not rank.case.trains:
        return forward, 0
    return forward, int(arena_bytes(backward_sizes(rank.extent(part, True), shape.backward())))


GradientLines = tuple[SumLines, SumLines, SumLines]
"""Of dq, dk and dv."""


def part_backward(rank: RankCase, part: RankPart, prefix: str, sums: GradientLines) -> None:
    """Computes a part's gradients and adds them."""
    if part.whole is not None:
        _join_backward(rank, part.whole, prefix, sums)
        return
    table, case = PrefixedTable(rank.table, prefix), rank.case
    queries, rows = part.queries.stop - part.queries.start, part.program.rows
    number = rank.travel if part.listed is None else rank.e
    if part.listed is not None:
        list_calls.backward(table, case._replace(shape=part.listed.shape), part.listed.calls)
        _add_gradients(rank, part, prefix, sums, number)
        return
    shape = part.program.shape
    extent = rank.extent(part, True)
    ends: list[End] = []

    def begin() -> None:
        table.add("dq", "temp_buffers", rank.numbers(queries) * rank.e, "B Q H D e")
        for name in ("dk", "dv"):
            table.add(name, "temp_buffers", rank.placed(rows) * number, "B R L D e, or w")
        back = shape.backward()
        sizes = backward_sizes(extent, back)
        sizes["slab"] = sizes["slab"] * (number // rank.e)
        own, other = int(arena_bytes(sizes)), _arenas(rank, part)[0]
        formula = "attention/sizes/tiles.py backward_sizes"
        ends.append(rank.kept.begin(rank.table, own, other, int(shape.seq), formula))
        in_kernel = shape.wide if shape.widens else rank.e
        ends.append(rank.kept.mask(rank.table, (*_ints(extent.mask), extent.band, in_kernel)))

    tiles.backward_calls(table, case._replace(shape=shape), extent, begin)
    for end in reversed(ends):
        end()
    _add_gradients(rank, part, prefix, sums, number)


def _add_gradients(rank: RankCase, part: RankPart, prefix: str, sums: GradientLines, number: int) -> None:
    """Adds the gradients of a part that are there, those of its keys in numbers of so many bytes."""
    rows = part.program.rows.total
    counts = (part.queries.stop - part.queries.start, rows, rows)
    for total, name, count, size in zip(
        sums, ("dq", "dk", "dv"), counts, (rank.e, number, number), strict=True
    ):
        total.add(prefix + name, count, size)
    rank.table.phase(f"{prefix}gradients added")


def _join_backward(rank: RankCase, part: WholePart, prefix: str, sums: GradientLines) -> None:
    """Adds the gradients of a part of whole calls."""
    table, calls = PrefixedTable(rank.table, prefix), part.calls
    # A row of a head is of all own tokens, and visiting queries come tokens before heads.
    row = APART if sums[0].visits else rank.plan.tokens
    case = rank.case._replace(shape=part.shape, lse_row=row)
    counts = (int(part.shape.queries), int(part.shape.seq), int(part.shape.seq))
    takes = all(total.numbers.takes(count, rank.e) for total, count in zip(sums, counts, strict=True))
    if takes and whole_calls.is_one(calls[0], backward_cut(calls[0], part.shape), case):
        whole_calls.backward(table, case, calls[:1])
        for total, name in zip(sums, ("dq", "dk", "dv"), strict=True):
            total.numbers.begin(prefix + name)
        calls = calls[1:]
    table.phase("before gradients are added")
    for total in sums:
        total.numbers.begin()
    for call in joining(calls):
        whole_calls.backward_parts(table, case, call)
    table.phase("gradients added")
