"""A plan's events, where phases come more than once."""

from planner.memory.allocator import replay
from planner.memory.table import PlanTable


def plan(*, again: bool):
    table = PlanTable()
    table.add("q", "qkv", 100, "")
    table.phase("calls")
    table.add("part", "temp_buffers", (20, 30), "")
    table.phase("calls, summed")
    table.add("sums", "workspace", 40, "")
    table.free("part", "sums")
    if again:
        table.again("calls")
    table.phase("after")
    table.add("dq", "gradients", 50, "")
    return table.done()


def test_phases_that_come_again_come_twice_and_free_what_was_theirs():
    once, twice = (list(plan(again=again).events()) for again in (False, True))
    calls = [("part", 20), ("part (2)", 30), ("sums", 40)]
    freed = [("part", None), ("part (2)", None), ("sums", None)]
    assert once == [("q", 100), *calls, *freed, ("dq", 50)]
    assert twice == [("q", 100), *calls, *freed, *calls, *freed, ("dq", 50)]


def test_the_peak_is_as_without():
    once, twice = plan(again=False), plan(again=True)
    assert once.peak() == twice.peak()
    assert replay(list(once.events())).peak_requested == replay(list(twice.events())).peak_requested == 190
