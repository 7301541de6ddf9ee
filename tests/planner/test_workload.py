"""A workload is checked when it is made."""

import pytest

from attention import ConfigError
from planner.workload import Workload


def test_floor_is_q_k_v_o():
    assert Workload(seq=131_072).floor == 4 * 131_072 * 8 * 64 * 2
    assert (
        Workload(seq=10, heads=8, kv_heads=2, head_dim=4, dtype="float32").floor == 2 * 10 * (8 + 2) * 4 * 4
    )


def test_round_trip():
    workload = Workload(seq=7, kv_heads=4, mode="training", causal=True)
    assert Workload.from_json(workload.to_json()) == workload


@pytest.mark.parametrize(
    "fields",
    [{"seq": 0}, {"seq": -1}, {"seq": 1.0}, {"seq": True}, {"seq": 8, "batch": 0}, {"seq": 8, "kv_heads": 3},
     {"seq": 8, "dtype": "int8"}, {"seq": 8, "mode": "eval"}, {"seq": 8, "sequence": 1}, {}],
)  # fmt: skip
def test_nonsense_is_refused(fields):
    with pytest.raises(ConfigError, match="Workload"):
        Workload(**fields)
