"""Messages arrive as they were sent, are counted, and are checked before any of them is posted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist

from attention.config import ShardingConfig
from attention.errors import DistributedError, InputError
from attention.sharding.groups import ring_of
from attention.sharding.transport import AGREED, Transport


def ring(timeout_s: float = 20.0) -> Transport:
    transport = ring_of(None, ShardingConfig(timeout_s=timeout_s))
    assert transport is not None
    transport.sent.clear()
    transport.received.clear()
    return transport


def numbers_of_all(rank: int) -> list[list[int]]:
    return ring().agree([rank, -rank, 1 << 62])


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_learns_the_numbers_of_all(ranks, world: int):
    expected = [[rank, -rank, 1 << 62, *[0] * (AGREED - 3)] for rank in range(world)]
    assert ranks(world).run(numbers_of_all) == [expected] * world


def swapped(rank: int, dtype: torch.dtype) -> tuple[dict[int, torch.Tensor], dict[int, int], dict[int, int]]:
    """Rank r sends r + 1 and then 10 (r + 1) numbers to each peer."""
    transport = ring()

    def of(rank: int, count: int) -> torch.Tensor:
        return torch.full((count,), rank + 1).to(dtype)

    sends = [(peer, of(rank, times * (rank + 1))) for peer in transport.peers for times in (1, 10)]
    receives = [
        (peer, torch.empty(times * (peer + 1), dtype=dtype)) for peer in transport.peers for times in (1, 10)
    ]
    # Some without numbers, which nobody posts.
    transport.exchange([*sends, (transport.peers[0], torch.empty(0))], receives, "swapping").wait()
    for peer, x in receives:
        assert torch.equal(x, torch.full_like(x, peer + 1))
    return [x for _, x in receives], dict(transport.sent), dict(transport.received)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_messages_to_a_peer_arrive_in_order_and_are_counted(ranks, dtype: torch.dtype):
    for rank, (_, sent, received) in enumerate(ranks(3).run(swapped, dtype)):
        peers = [peer for peer in range(3) if peer != rank]
        assert sent == dict.fromkeys(peers, 11 * (rank + 1) * dtype.itemsize)
        assert received == {peer: 11 * (peer + 1) * dtype.itemsize for peer in peers}


def refused(rank: int) -> list[str]:
    """What is wrong is refused before anything is posted: a good exchange follows."""
    transport = ring()
    good, peer = torch.ones(4, 4), transport.peers[0]
    texts = []
    for message, error in (
        ((peer, good.t()[1:]), ValueError),
        ((rank, good), ValueError),
        ((transport.world, good), ValueError),
        ((peer, torch.ones(2, device="meta")), ValueError),
    ):
        with pytest.raises(error) as info:
            transport.exchange([(peer, good), message], [], "refusing")
        texts.append(str(info.value))
    with pytest.raises(InputError, match="cannot be sent over this process group") as one:
        transport.exchange([(peer, torch.ones(2, device="meta"))], [], "refusing")
    swapped(rank, torch.float32)
    return [*texts, str(one.value)]


def test_a_bad_message_is_refused_before_any_is_posted(ranks):
    texts = ranks(2).run(refused)[0]
    words = ["contiguous", "no peer 0 of rank 0", "no peer 2 of rank 0", "one device", "meta"]
    assert all(word in text for word, text in zip(words, texts, strict=True))


def kept(rank: int) -> None:
    transport = ring()
    assert copy.deepcopy(transport) is transport
    with pytest.raises(TypeError, match="save its state_dict"):
        pickle.dumps(transport)
    with pytest.raises(ValueError, match="at most 32 numbers, got 33"):
        transport.agree([0] * (AGREED + 1))
    assert transport.unfit(torch.device("cpu")) is None
    assert "cpu:gloo,cuda:nccl" in str(transport.unfit(torch.device("cuda")))


def test_a_ring_is_copied_as_itself_and_not_pickled(ranks):
    ranks(2).run(kept)


def closed(rank: int) -> tuple[str, str, bool]:
    """One rank raises between two exchanges; then the ring is closed, and the group that it is of is not."""
    transport = ring(5.0)
    transport.agree([0])
    error: BaseException
    try:
        if rank == 0:
            with transport.whole("computing"):
                raise ZeroDivisionError("by nothing")
        transport.exchange([], [(0, torch.empty(3))], "receiving").wait()
        raise AssertionError
    except (ZeroDivisionError, DistributedError) as caught:
        error = caught
    with pytest.raises(DistributedError, match="the ring is closed") as again:
        transport.agree([0])
    one = torch.ones(1)
    dist.all_reduce(one)
    assert ring(5.0) is not transport
    assert ring(5.0).agree([rank])[1][0] == 1
    return str(error), str(again.value), bool(one == dist.get_world_size())


def test_an_error_of_a_rank_ends_the_call_of_all_at_once_and_closes_the_ring(ranks):
    own, *others = ranks(3).run(closed)
    assert own[0] == "by nothing"
    for text, again, reduced in others:
        assert "rank 0 raised ZeroDivisionError in computing: by nothing" in text
        assert "after 0." in text
        assert "waited for ranks [0] in receiving" in again
        assert reduced
