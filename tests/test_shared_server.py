"""The server that tests share: one for all batches, and never one that still does what nobody waits for."""

from __future__ import annotations

import json

import pytest
import shared_server
from shared_server import SharedServer

from planner.measuring.process import Ended

DONE = Ended(0, False, {}, "")


class Server:
    """In the place of a real one: `ends` has what each task of it ends in."""

    def __init__(self, ends):
        self.ends, self.tasks, self.alive = ends, [], True

    def run(self, task, seconds):
        self.tasks.append(task)
        end = self.ends.pop(0)
        if isinstance(end, BaseException):
            raise end
        self.alive = end.code == 0
        return end

    def end(self):
        self.alive = False


@pytest.fixture
def started(monkeypatch, request):
    """The servers that were started; the second task of each ends as the test's parameter says."""
    servers = []

    def start():
        servers.append(Server([DONE, request.param, DONE]))
        return servers[-1]

    monkeypatch.setattr(shared_server, "_Server", start)
    return servers


def second(end):
    return pytest.mark.parametrize("started", [end], indirect=True)


@second(DONE)
def test_batches_share_a_server_and_single_runs_too(started):
    server = SharedServer()
    for _ in range(2):
        assert server.run({"a": 1}, 5.0) == DONE
        server.end()
    assert server.single(json.dumps({"b": 2}), 3.0) == DONE
    [only] = started
    assert only.tasks == [{"a": 1}, {"a": 1}, {"b": 2, "seconds": 3.0}]
    assert only.alive
    server.close()
    assert not only.alive


@second(Ended(-9, False, {}, ""))
def test_one_that_died_is_started_again(started):
    server = SharedServer()
    assert [server.run({}, 1.0).code for _ in range(3)] == [0, -9, 0]
    assert [one.alive for one in started] == [False, True]


@second(KeyboardInterrupt())
def test_one_that_was_interrupted_ends_with_its_batch(started):
    server = SharedServer()
    server.run({}, 1.0)
    with pytest.raises(KeyboardInterrupt):
        server.run({}, 1.0)
    server.end()
    assert [one.alive for one in started] == [False]
    assert server.run({}, 1.0) == DONE
    assert len(started) == 2
