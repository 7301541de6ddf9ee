"""What held memory at the peak, from events as PyTorch's allocator records them."""

from __future__ import annotations

import random

import pytest

from planner.programs import observer
from planner.programs.observer import peak_holders, place_of


def frame(name: str, line: int = 1, function: str = "f") -> dict:
    return {"filename": name, "line": line, "name": function}


TORCH = frame("/env/lib/python3.11/site-packages/torch/nn/modules/linear.py", 7, "forward")
MODEL = frame("/env/lib/python3.11/site-packages/transformers/llama.py", 8, "forward")
MINE = frame("/code/train.py", 9, "step")


@pytest.mark.parametrize(
    "frames, place",
    [
        ([], "backward (autograd)"),
        ([TORCH], "torch/nn/modules/linear.py:7 forward"),
        ([MINE], "/code/train.py:9 step"),
        ([TORCH, MODEL, MINE], "transformers/llama.py:8 forward > torch/nn/modules/linear.py forward"),
        ([MODEL, TORCH, MINE], "transformers/llama.py:8 forward"),
        ([frame("<frozen importlib>"), MINE], "/code/train.py:9 step"),
        ([frame("<string>")], "<string>:1 f"),
        ([frame(observer.__file__), MINE], "/code/train.py:9 step"),
        ([frame(random.__file__), MINE], "/code/train.py:9 step"),
    ],
)
def test_a_tensor_is_named_by_the_innermost_line_outside_of_torch(frames, place):
    assert place_of(frames) == place


def test_a_file_of_the_working_directory_is_named_from_there(monkeypatch):
    monkeypatch.setattr(observer, "_HERE", "/code")
    assert place_of([MINE]) == "train.py:9 step"


def test_the_peak_is_found_and_what_held_it():
    trace = [
        {"action": "alloc", "addr": 1, "size": 10, "frames": [MINE]},
        {"action": "segment_alloc", "addr": 7, "size": 1000, "frames": [MINE]},
        {"action": "alloc", "addr": 2, "size": 30, "frames": [TORCH, MODEL]},
        {"action": "free_requested", "addr": 1, "size": 10},
        {"action": "free_completed", "addr": 1, "size": 10},
        {"action": "alloc", "addr": 1, "size": 5, "frames": [TORCH]},
    ]
    peak, holders = peak_holders(trace, [(1, 5, [TORCH]), (2, 30, [TORCH, MODEL])])
    assert peak == 40
    assert holders == [(place_of([TORCH, MODEL]), 30, 1), (place_of([MINE]), 10, 1)]


def test_what_is_older_than_the_history_counts():
    old = (9, 100, [MODEL])
    freed = [{"action": "free_requested", "addr": 3, "size": 50}]
    assert peak_holders([], [old]) == (100, [(place_of([MODEL]), 100, 1)])
    assert peak_holders(freed, [old])[0] == 150


def test_random_histories_meet_a_plain_replay():
    rng = random.Random(0)
    for _ in range(200):
        live: dict[int, tuple[int, str]] = {}
        trace, best, best_live = [], 0, {}
        for _ in range(rng.randrange(1, 60)):
            if live and rng.random() < 0.45:
                address = rng.choice(list(live))
                trace.append({"action": "free_requested", "addr": address, "size": live.pop(address)[0]})
            else:
                address, size = rng.choice([a for a in range(99) if a not in live]), rng.randrange(1, 99)
                name = rng.choice("abc")
                live[address] = (size, name)
                trace.append(
                    {"action": "alloc", "addr": address, "size": size, "frames": [frame(f"/{name}.py")]}
                )
                if sum(size for size, _ in live.values()) > best:
                    best, best_live = sum(size for size, _ in live.values()), dict(live)
        blocks = [(address, size, [frame(f"/{name}.py")]) for address, (size, name) in live.items()]
        begin = rng.choice([0, 0, len(trace) // 2])
        if begin:
            peak, _ = peak_holders(trace[begin:], blocks)
            assert peak <= best
            continue
        peak, holders = peak_holders(trace, blocks)
        assert peak == best
        sums = {name: sum(s for s, n in best_live.values() if n == name) for name in "abc"}
        if sum(size for _, size, _ in holders) == best:
            assert {where[1]: size for where, size, _ in holders} == {n: s for n, s in sums.items() if s}
