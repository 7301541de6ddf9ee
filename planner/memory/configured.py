"""From a config and a workload to its memory plan. Imports no torch."""

from __future__ import annotations

from attention.config import AttentionConfig
from attention.ops.program import Shape, chunk_tokens
from attention.rows import rows_of
from planner.memory import plans
from planner.memory.kernels import Cpu, Cuda, Machine
from planner.memory.plan import Plan, Table
from planner.workload import Workload

UNBOUNDED = 1 << 62


def plan_of(config: AttentionConfig, workload: Workload, machine: Machine) -> Plan:
    """The plan of one call, and in training of its backward."""
    case = case_of(config, workload, machine)
    shape = case.shape
    table = Table()
    plans.inputs(table, case)
    branches = shape.within(config.branches)
    if config.variant == "dense":
        branches = ((shape.seq, 1),)
    everything = len(branches) == 1 and branches[0][0] >= shape.seq and branches[0][1] == 1
    if config.variant == "block_sparse":
        rows = rows_of(config, workload.seq, workload.causal)
        if goes_flex(config, workload, machine):
            plans.flex(table, case, rows, -(-workload.seq // rows.size))
        else:
            plans.block_sparse(table, case, rows)
    elif everything and shape.heads == shape.kv_heads:
        plans.whole(table, case)
    else:
        plans.dilated(table, case, sorted(branches, key=lambda branch: branch[1]))
    return table.done()


def goes_flex(config: AttentionConfig, workload: Workload, machine: Machine) -> bool:
    """Whether compiled FlexAttention runs it; see `attention.ops.flex.unfit`."""
    block = config.pattern.block_size if config.pattern else 0
    return (
        config.backend != "sdpa"
        and isinstance(machine, Cuda)
        and machine.capability >= (8, 0)
        and workload.dtype != "float64"
        and not workload.weights
        and block >= 16
        and block & (block - 1) == 0
    )


def case_of(config: AttentionConfig, workload: Workload, machine: Machine) -> plans.Case:
    """Sizes of the call; see `attention.inputs.shape_of`."""
    cpu = isinstance(machine, Cpu)
    sixteen = cpu and workload.itemsize == 2
    sizes = {
        "seq": workload.seq,
        "heads": workload.heads,
        "kv_heads": workload.groups,
        "head_dim": workload.head_dim,
        "itemsize": workload.itemsize,
        "workspace": config.workspace_bytes,
    }
    shape = Shape(
        **sizes,
        causal=workload.causal,
        chunk=chunk_tokens(cpu=cpu, **sizes),
        packs=sixteen and isinstance(machine, Cpu) and workload.dtype in machine.units,
        widens=sixteen,
    )
    return plans.Case(
        batch=workload.batch,
        shape=shape,
        trains=workload.mode == "training",
        machine=machine,
        keeps_lse=workload.weights,
        pool=bool(plans.pooled(config.pool, config.pool_bytes, workload.seq)),
        pool_bytes=UNBOUNDED if config.pool_bytes is None else config.pool_bytes,
    )
