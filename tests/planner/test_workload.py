"""A workload is checked when it is made."""

import json

import numpy as np
import pytest

from attention import ConfigError
from planner.workload import Workload


def test_floor_is_q_k_v_o():
    assert Workload(seq=131_072).floor == 4 * 131_072 * 8 * 64 * 2
    assert (
        Workload(seq=10, heads=8, kv_heads=2, head_dim=4, dtype="float32").floor == 2 * 10 * (8 + 2) * 4 * 4
    )


def test_the_floor_of_fewer_queries_has_their_q_and_out_and_all_keys():
    workload = Workload(seq=100, heads=8, kv_heads=2, head_dim=4, dtype="float32", batch=3, queries=7)
    assert workload.floor == 2 * 3 * (7 * 8 + 100 * 2) * 4 * 4
    assert workload.floor_at(50) == 2 * 3 * (7 * 8 + 50 * 2) * 4 * 4
    lengths = np.array([64, 4096])
    plain = Workload(seq=64)
    assert (plain.floor_at(lengths) == [plain.floor, 64 * plain.floor]).all()


def test_what_came_later_is_written_where_it_is_given():
    plain = Workload(seq=10)
    assert not {"queries", "documents", "sinks", "gpus"} & json.loads(plain.to_json()).keys()
    workload = Workload(seq=10, queries=1, documents=(4, 6), sinks=True, gpus=4)
    assert {"queries": 1, "sinks": True, "gpus": 4}.items() <= json.loads(workload.to_json()).items()
    assert Workload.from_json(workload.to_json()) == workload
    assert not workload.is_plain
    assert plain.is_plain
    assert Workload(seq=10, queries=10).is_plain


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"queries": 11}, "last tokens of the sequence, at most seq=10"),
        ({"queries": 0}, "queries"),
        ({"documents": (4, 5)}, "add up to seq: they have 9 tokens in all, seq=10"),
        ({"documents": (10, 0)}, r"documents\.1"),
        ({"documents": ()}, "1 to 65,536 lengths, got 0"),
        ({"documents": (1,) * 65_537, "seq": 65_537}, "got 65,537"),
        ({"documents": (10,), "weights": True}, "leave out documents or weights"),
        ({"queries": 1, "weights": True}, "leave out queries or weights"),
    ],
)
def test_queries_and_documents_fit_the_sequence(fields, why):
    with pytest.raises(ConfigError, match=why):
        Workload(**{"seq": 10, **fields})


def test_round_trip():
    workload = Workload(seq=7, kv_heads=4, mode="training", causal=True)
    assert Workload.from_json(workload.to_json()) == workload


@pytest.mark.parametrize(
    "fields",
    [{"seq": 0}, {"seq": -1}, {"seq": 1.0}, {"seq": True}, {"seq": 8, "batch": 0}, {"seq": 8, "kv_heads": 3},
     {"seq": 8, "dtype": "int8"}, {"seq": 8, "mode": "eval"}, {"seq": 8, "sequence": 1}, {},
     {"seq": 8, "gpus": 0}],
)  # list of small dicts  # fmt: skip
def test_nonsense_is_refused(fields):
    with pytest.raises(ConfigError, match="Workload"):
        Workload(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"batch": 1 << 41},
        {"heads": 1 << 24},
        {"gpus": 1 << 17},
        {"heads": 4, "kv_heads": 1 << 50},
        {"head_dim": 1 << 41},
        {"seq": 1 << 41},
        {"seq": 1 << 40, "batch": 1 << 20},
        {"seq": (1 << 30) + 1, "weights": True},
    ],
)
def test_sizes_that_nobody_has_are_refused(fields):
    with pytest.raises(ConfigError, match=r"at most [0-9,]+"):
        Workload(**{"seq": 8, **fields})


def test_the_most_tokens_are_planned_for_and_one_more_is_not():
    for fields in ({}, {"weights": True}, {"batch": 1 << 20, "heads": 1 << 12}):
        most = Workload(seq=1, **fields).most_tokens
        assert Workload(seq=most, **fields).seq == most
        with pytest.raises(ConfigError):
            Workload(seq=most + 1, **fields)
