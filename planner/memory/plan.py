"""From a config and a workload to its memory plan. Imports no torch, and no NumPy but for the weights."""

from __future__ import annotations

from attention.config import AttentionConfig, Backend
from attention.sizes.adaptive import active_of_choice
from attention.sizes.arrays import Count
from attention.sizes.flex import flex_is_lean
from attention.sizes.row_bounds import Rows, rows_of
from attention.sizes.shape import Shape, chunk_tokens
from planner.memory.machines import Cpu, Cuda, Machine
from planner.memory.plans import adaptive as plans_adaptive
from planner.memory.plans import multihead as plans_multihead
from planner.memory.plans import tiles as plans
from planner.memory.plans import weights as plans_weights
from planner.memory.table import Plan, Table
from planner.workload import Workload

UNBOUNDED = 1 << 62


def plan_of(config: AttentionConfig, workload: Workload, machine: Machine, *, warm: bool = False) -> Plan:
    """The plan of one call, and in training of its backward. `warm`: of a second equal call, with what the
    first left in pool and caches."""
    case = case_of(config, workload, machine)._replace(warm=warm)
    table = Table()

    def attend(table: Table, case: plans.Case) -> None:
        def alone(table: Table, case: plans.Case) -> None:
            _attention(table, case, config, workload)

        if workload.weights:
            plans_weights.weighted(table, case, alone, asked_of(config, workload))
        else:
            alone(table, case)

    if config.multihead:
        checkpoint = config.multihead.checkpoint and not workload.weights
        plans_multihead.multihead(table, case, attend, bias=config.multihead.bias, checkpoint=checkpoint)
    else:
        plans.inputs(table, case)
        attend(table, case)
    return table.done()


def _attention(table: Table, case: plans.Case, config: AttentionConfig, workload: Workload) -> None:
    """The attention alone, over q, k and v."""
    shape, machine = case.shape, case.machine
    branches = shape.within(config.branches)
    if config.variant == "dense":
        branches = ((shape.seq, 1),)
    everything = len(branches) == 1 and branches[0][0] >= shape.seq and branches[0][1] == 1
    if config.adaptive:
        rows = rows_of(config, workload.seq, workload.causal)
        scorer = plans_adaptive.scorer_of(case, rows.size, rows.lists, config.adaptive.score_dim)
        plans_adaptive.adaptive(table, case, scorer)
    elif config.variant == "block_sparse":
        rows = rows_of(config, workload.seq, workload.causal)
        if has_flex(workload, machine) and goes_flex(config.backend, rows, workload.seq, workload):
            plans.flex(table, case, rows)
        else:
            plans.block_sparse(table, case, rows)
    elif everything and shape.heads == shape.kv_heads:
        plans.whole(table, case)
    else:
        plans.dilated(table, case, sorted(branches, key=lambda branch: branch[1]))


def asked_of(config: AttentionConfig, workload: Workload) -> plans_weights.Asked:
    """The weights that a call returns; see `attention.ops.weights.weights_block`."""
    if config.adaptive:
        rows = rows_of(config, workload.seq, workload.causal)
        active = active_of_choice(-(-workload.seq // rows.size), rows.lists, workload.causal)
        return plans_weights.Asked(rows.size, active, branches=0, own=True)
    from attention.layout import DEFAULT_BLOCK_SIZE, count_active  # NumPy, which nothing else here needs

    size = config.pattern.block_size if config.pattern else DEFAULT_BLOCK_SIZE
    active = count_active(config, workload.seq, workload.causal)
    branches = len(config.branches) if config.variant == "dilated" else 0
    return plans_weights.Asked(size, active, branches, own=False)


def has_flex(workload: Workload, machine: Machine) -> bool:
    """Whether compiled FlexAttention runs such workloads there; see `attention.ops.flex.unfit`."""
    return (
        isinstance(machine, Cuda)
        and machine.capability >= (8, 0)
        and workload.dtype != "float64"
        and not workload.weights
    )


def goes_flex(backend: Backend, rows: Rows, seq: Count, workload: Workload) -> Count:
    """1 if compiled FlexAttention runs a block_sparse pattern where `has_flex`, else 0; `workload.seq` is not
    read. See `attention.ops.flex.resolve`."""
    block, floor = rows.size, workload.floor // workload.seq * seq
    runs = (backend != "sdpa") * (block >= 16) * (block & (block - 1) == 0)
    return runs * flex_is_lean(rows, seq, floor) if backend == "auto" else runs


def case_of(config: AttentionConfig, workload: Workload, machine: Machine) -> plans.Case:
    """Sizes of the call; see `attention.inputs.shape_of`."""
    pool_bytes = UNBOUNDED if config.pool_bytes is None else config.pool_bytes
    pool = plans.pooled(config.pool, config.pool_bytes, workload.seq)
    case = sized(workload, machine, workload.seq, config.workspace_bytes, pool, pool_bytes)
    return case._replace(cache_entries=config.cache_entries, cache_bytes=config.cache_bytes)


def sized(
    workload: Workload, machine: Machine, seq: Count, workspace: Count, pool: Count, pool_bytes: Count
) -> plans.Case:
    """The same for any lengths, workspaces and pools; `workload.seq` is not read."""
    cpu = isinstance(machine, Cpu)
    sixteen = cpu and workload.itemsize == 2
    sizes = {
        "seq": seq,
        "heads": workload.heads,
        "kv_heads": workload.groups,
        "head_dim": workload.head_dim,
        "itemsize": workload.itemsize,
        "workspace": workspace,
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
        pool=pool,
        pool_bytes=pool_bytes,
    )
