"""Few combinations of parameters that still put every two values together."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def pairwise(rows: Sequence[Mapping[str, Hashable]]) -> set[int]:
    """Numbers of few rows in which any two values of two parameters meet that do in any row.

    Greedy: next is the row with the most pairs that have not met, the first of those. What a row adds only
    falls, so that the row on top of the heap is the best once its count is up to date.
    """
    pairs = [set(combinations(row.items(), 2)) or set(row.items()) for row in rows]
    heap = [(-len(each), number) for number, each in enumerate(pairs)]
    heapq.heapify(heap)
    met: set[object] = set()
    chosen = set()
    while heap:
        counted, number = heapq.heappop(heap)
        new = pairs[number] - met
        if len(new) == -counted:
            chosen.add(number)
            met |= new
        elif new:
            heapq.heappush(heap, (-len(new), number))
    return chosen
