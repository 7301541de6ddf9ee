"""What a recommendation prints as a program runs, and builds the config it is of."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from attention import AttentionConfig, ShardingConfig
from planner.fitting.samples import samples
from planner.report.text.snippet import snippet
from planner.workload import Workload

CASES = [
    case
    for case in islice(samples(5, longest=300, work=1e6), 80)
    if case.config.multihead is None and not case.workload.weights
][:24]


@pytest.mark.parametrize("config, workload", CASES)
def test_it_runs_as_pasted_and_builds_the_config(config, workload, capsys):
    names: dict[str, object] = {}
    exec(snippet(config, workload), names)
    attend, out, q = names["attend"], names["out"], names["q"]
    assert attend.config == config
    assert out.shape == (workload.batch, workload.seq, workload.heads, workload.head_dim)
    assert out.dtype == getattr(torch, workload.dtype)
    assert names["k"].shape[2] == workload.groups
    assert (q.grad is not None) == (workload.mode == "training")
    assert str(tuple(out.shape)) in capsys.readouterr().out


def test_where_gpus_share_a_call_it_is_the_program_of_a_rank():
    config = AttentionConfig(variant="dense", sharding=ShardingConfig(exchange="heads", ring_size=2))
    text = snippet(config, Workload(seq=4096, batch=4, gpus=4, mode="training"))
    compile(text, "rank", "exec")
    assert 'sharding=ShardingConfig(ring_size=2, exchange="heads")' in text
    assert "own = len(attend.positions(4096))" in text
    assert "torch.randn(2, own, 8, 64" in text
