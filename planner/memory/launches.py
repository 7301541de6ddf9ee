"""How many kernels a call launches on a GPU, in closed form: ints, or arrays of many candidates. No torch.

Held against what dry runs launch, whose host code is torch's own (tests/planner/memory/test_launches.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from attention.config import AttentionConfig
from attention.sizes.arrays import Count, any_of
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import WholeCall, by_cudnn
from planner.configs import Columns, columns_of
from planner.memory.call_launches import Pass, document_calls, lse_has_gaps, sinks, summed, whole_calls
from planner.memory.dispatch import calls_of, document_call_of, goes_apart, lists_of, sequences_of, shape_of
from planner.memory.machines import Cuda, Machine
from planner.workload import Workload


class Launches(NamedTuple):
    """Kernels of an attention alone, without the projections around it."""

    forward: Count
    backward: Count
    """0 in inference. What a checkpoint computes again is among it."""
    attention: Count
    """Those of both that multiply queries and keys."""

    @property
    def number(self) -> Count:
        """Of both passes."""
        return self.forward + self.backward


def launches(columns: Columns, workload: Workload, machine: Machine) -> Launches | None:
    """Of candidates of which `goes_apart` holds for all or for none; `workload.seq` is not read. None where
    nobody counted them: on a CPU, of weights, of what is no whole calls but tiles, lists, plain products or
    compiled FlexAttention, of some fewer queries in dilated branches (`_turn`), and where cuDNN's attention
    runs a call of some candidate: how many kernels its engines launch is not published."""
    if not isinstance(machine, Cuda) or workload.weights or any_of(goes_apart(columns, workload, machine)):
        return None
    shape = shape_of(columns, workload, machine)
    if sequences_of(columns, workload, machine):
        passes = document_calls(document_call_of(columns, shape), shape, workload.batch)
        return _of_mode(_with_sinks(passes, workload, shape, workload.batch > 1), columns, workload)
    calls = calls_of(columns, shape)
    if calls is None or _some_by_cudnn(calls, shape) or _turn(calls):
        return None
    passes = whole_calls(calls, shape, workload.batch, machine)
    gaps = lse_has_gaps(calls, shape, machine)
    return _of_mode(_with_sinks(passes, workload, shape, gaps), columns, workload)


def launches_of(config: AttentionConfig, workload: Workload, machine: Machine) -> Launches | None:
    """Of one config; see `launches`. Those over lists are counted where the lists follow from the config and
    are not cut into very many parts; what an adaptive attention chooses decides how many kernels it
    launches."""
    columns = columns_of(config, workload.seq)
    if columns.pattern_type != "dilated_sparse" or not isinstance(machine, Cuda) or workload.weights:
        return launches(columns, workload, machine)
    shape = shape_of(columns, workload, machine)
    lists = lists_of(columns, shape)
    if lists is None or goes_apart(columns, workload, machine) or _some_by_cudnn(lists.own, shape):
        return None
    from planner.memory.list_launches import ListedRows, list_calls  # loads NumPy

    passes = list_calls(lists, ListedRows.of(config, shape), shape, workload.batch, machine)
    if passes is None:
        return None
    return _of_mode(_with_sinks(passes, workload, shape, 0), columns, workload)


def _with_sinks(
    passes: tuple[Pass, Pass], workload: Workload, shape: Shape, gaps: Count
) -> tuple[Pass, Pass]:
    """The passes and what learned sinks launch."""
    if not workload.sinks:
        return passes
    more = sinks(shape, workload.batch, gaps)
    ahead, behind = (summed(one, other, 1) for one, other in zip(passes, more, strict=True))
    return ahead, behind


def _turn(calls: Iterable[WholeCall]) -> bool:
    """Whether some call's heads begin at other queries than at keys."""
    return any(any_of(call.turn * call.exists) for call in calls)


def _some_by_cudnn(calls: Iterable[WholeCall], shape: Shape) -> bool:
    return any(any_of(by_cudnn(call, shape) * call.exists) for call in calls)


def _of_mode(passes: tuple[Pass, Pass], columns: Columns, workload: Workload) -> Launches:
    """What a call in a mode launches of what forward and backward do."""
    ahead, behind = passes
    if workload.mode != "training":
        behind = Pass(0 * behind.kernels, 0)
    elif columns.multihead is not None and columns.multihead.checkpoint:
        behind = summed(behind, ahead, 1)
    return Launches(ahead.kernels, behind.kernels, ahead.attention + behind.attention)
