"""Messages between the ranks of a ring, with one deadline a call and one error.

Every failure is a `DistributedError`, and after it the ring is closed: what was on its way would be taken for
messages of a later call. With gloo (tensors of the CPU, and what is agreed on for all) it comes in time.

With NCCL `Pending.wait` lets the device's stream wait and not the host, so nothing is raised here: NCCL's
watchdog ends the process at the timeout of the process group (`init_process_group(timeout=...)`, 10 minutes
if nothing is said), and its dump says which rank was late if TORCH_NCCL_DUMP_ON_TIMEOUT=1 and
TORCH_NCCL_TRACE_BUFFER_SIZE=2000 are set. A rank that does not come to a call at all is told by `agree`,
which always goes over gloo, before NCCL is asked for anything.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from attention.errors import DistributedError, InputError, shortened

AGREED: Final = 32
"""Whole numbers that ranks agree on at a time, at most."""
GRACE, SPARE = 0.3, 0.1
"""Seconds in which ranks that failed wait for each other's word, and for an answer of the store."""
RAISED: Final = " raised "
"""In the word of a rank whose own error ended the call."""
SHORTEST: Final = timedelta(milliseconds=1)
"""A shorter wait would be none, which stands for the group's own timeout."""
NEVER_SENT: Final = 29_999
"""A tag of no message."""

Message = tuple[int, Tensor]
"""(peer, what goes to it or comes from it)."""


class Transport:
    """The messages of one rank of a ring.

    Layers share it, and one thread uses it: calls come in one order on all ranks. Peers are numbered within
    the ring. A copy is the same ring; it cannot be pickled.
    """

    def __init__(
        self, group: dist.ProcessGroup, timeout_s: float, devices: dist.ProcessGroup | None = None
    ) -> None:
        """`group`: a gloo group of the ring's ranks, for nothing but this. `devices`: the group for tensors
        that are not the CPU's, of the ring's ranks and maybe others."""
        self.group, self.devices, self.timeout_s = group, devices, timeout_s
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = tuple(dist.get_process_group_ranks(group))
        """The ring's ranks in the whole job."""
        self.sent: Counter[int] = Counter()
        """Bytes of payload sent to each peer; who counts clears it."""
        self.received: Counter[int] = Counter()
        self.failure: str | None = None
        """What closed the ring."""
        self.calls = 0
        """Forward calls that the ring has begun."""
        self._begun = time.monotonic()
        self._warm = False
        with suppress(RuntimeError):  # the word of a group before that had the same name
            self._store().delete_key(str(self.own))

    def __deepcopy__(self, memo: dict[int, Any]) -> Transport:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a sharded attention is tied to its process group and cannot be pickled; save its state_dict() "
            "and its config, and build it anew"
        )

    @property
    def own(self) -> int:
        """This rank in the whole job."""
        return self.ranks[self.rank]

    @property
    def peers(self) -> tuple[int, ...]:
        """The other ranks of the ring, the next one first."""
        return tuple((self.rank + step) % self.world for step in range(1, self.world))

    @property
    def left(self) -> timedelta:
        """The time until the deadline."""
        seconds = self._begun + self.timeout_s - time.monotonic()
        return max(timedelta(seconds=seconds), SHORTEST)

    def begin(self) -> None:
        """The deadline of what follows is the timeout from now."""
        self._begun = time.monotonic()

    def agree(self, numbers: Sequence[int], step: str = "agreeing on the call") -> list[list[int]]:
        """The numbers of all ranks, at most `AGREED` of them each, filled up with zeros. It waits for all
        ranks to come, at most the timeout; what follows has the timeout anew."""
        if len(numbers) > AGREED:
            raise ValueError(f"ranks agree on at most {AGREED} numbers, got {len(numbers)}")
        self.begin()
        table = torch.zeros(self.world, AGREED, dtype=torch.int64)
        table[self.rank, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        # To each by itself and not by an all-gather: then it is known who did not come.
        own = [(peer, table[self.rank]) for peer in self.peers]
        others = [(peer, table[peer]) for peer in self.peers]
        self._posted(own, others, step, self.group).wait()
        self.begin()
        return [[int(number) for number in row] for row in table.tolist()]

    def warm_up(self, device: torch.device) -> None:
        """Opens the communicator of a device's group, of which NCCL wants all ranks the first time. For
        tensors of the CPU, and from the second time on, nothing."""
        if device.type == "cpu" or self._warm or self.devices is None:
            return
        dist.all_reduce(torch.zeros(1, device=device), group=self.devices)
        self._warm = True

    def unfit(self, device: torch.device) -> str | None:
        """Why tensors on a device cannot be sent; None if they can."""
        group = self.group if self.devices is None else self.devices
        backend = backends(group).get(device.type)
        if backend is None or (device.type != "cpu" and backend == "gloo"):
            names = ", ".join(f"{kind}:{name}" for kind, name in backends(group).items())
            return (
                f"tensors on {device} cannot be sent over this process group, whose backends are {names}; "
                "make one with init_process_group(backend='cpu:gloo,cuda:nccl'), or move the tensors"
            )
        return None

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], step: str) -> Pending:
        """Posts all messages, to be waited for by `Pending.wait`. Messages to a peer arrive in the order in
        which they were posted; those without numbers are left out, on both sides."""
        sends = [(peer, x.detach()) for peer, x in sends if x.numel()]
        receives = [(peer, x.detach()) for peer, x in receives if x.numel()]
        pending = self._posted(sends, receives, step, self._checked((*sends, *receives), step))
        for counts, messages in ((self.sent, sends), (self.received, receives)):
            for peer, x in messages:
                counts[peer] += x.nbytes
        return pending

    @contextmanager
    def whole(self, step: str) -> Iterator[None]:
        """What is done between two exchanges of a call: an error in it closes the ring, and lets peers that
        wait for this rank know at once."""
        try:
            yield
        except BaseException as error:
            if self.failure is None:
                what = f"{type(error).__name__} in {step}: {shortened(str(error), 300)}"
                self.close(f"rank {self.own}{RAISED}{what}")
            raise

    def close(self, why: str) -> None:
        """Ends the ring: peers that wait for this rank fail now, and every later call here."""
        self.failure = why
        self._words(why, wait=0)
        # Gloo closes all connections of a group in which a wait has run out.
        with suppress(RuntimeError):
            work = dist.irecv(torch.empty(1), self.ranks[self.peers[0]], self.group, NEVER_SENT)
            if work is not None:
                work.wait(SHORTEST)

    def failed(self, pending: Pending, waiting: Sequence[int], why: str) -> DistributedError:
        """The error of a wait for peers that did not end; closes the ring."""
        seconds = time.monotonic() - self._begun
        peers = tuple(sorted({self.ranks[peer] for peer in waiting}))
        messages = zip(pending.peers, pending.tensors, strict=True)
        nbytes = sum(x.nbytes for peer, x in messages if peer in waiting)
        self.failure = f"rank {self.own} waited for ranks {list(peers)} in {pending.step}"
        words = self._words(self.failure, wait=GRACE)
        missing = peers  # if nobody can be asked
        if words is not None:
            missing = tuple(rank for rank in self.ranks if rank != self.own and rank not in words)
        errors = "; ".join(text for text in (words or {}).values() if RAISED in text)
        silent = f"no word since from ranks {list(missing)}" if missing else "all others failed too"
        return self._error(
            pending.step,
            f"waited for ranks {list(peers)}, {nbytes:,} bytes: {errors or silent}. Look first at the rank "
            f"that ended first ({shortened(why.split('. ')[0], 200)})",
            peers=peers,
            missing=missing,
            nbytes=nbytes,
            seconds=seconds,
        )

    def _error(
        self,
        step: str,
        why: str,
        *,
        peers: tuple[int, ...] = (),
        missing: tuple[int, ...] = (),
        nbytes: int = 0,
        seconds: float = 0.0,
    ) -> DistributedError:
        return DistributedError(
            f"rank {self.own}, {step}, after {seconds:.2f} s of {self.timeout_s:g} s: {why}",
            rank=self.own,
            peers=peers,
            missing=missing,
            step=step,
            nbytes=nbytes,
            seconds=seconds,
        )

    def _checked(self, messages: Sequence[Message], step: str) -> dist.ProcessGroup:
        """The group for the messages. Checked before anything is posted: gloo refuses a strided tensor when
        others of the batch are on their way, and a later call would take those."""
        devices = {x.device for _, x in messages}
        if len(devices) > 1:
            raise ValueError(f"{step}: messages are on one device, got {sorted(map(str, devices))}")
        for peer, x in messages:
            if not 0 <= peer < self.world or peer == self.rank:
                raise ValueError(f"{step}: no peer {peer} of rank {self.rank} among {self.world}")
            if not x.is_contiguous():
                raise ValueError(f"{step}: messages are contiguous, got {tuple(x.shape)} by {x.stride()}")
        for device in devices:
            if why := self.unfit(device):
                raise InputError(why)
            if device.type != "cpu" and self.devices is not None:
                return self.devices
        return self.group

    def _posted(
        self, sends: Sequence[Message], receives: Sequence[Message], step: str, group: dist.ProcessGroup
    ) -> Pending:
        if self.failure is not None:
            raise self._error(step, f"the ring is closed: {self.failure}; make a new process group")
        messages = [*receives, *sends]
        pending = Pending(self, step, [peer for peer, _ in messages], [x for _, x in messages])
        if messages:
            operations = [dist.P2POp(dist.irecv, x, self.ranks[peer], group) for peer, x in receives]
            operations += [dist.P2POp(dist.isend, x, self.ranks[peer], group) for peer, x in sends]
            try:
                pending.works = dist.batch_isend_irecv(operations)
            except RuntimeError as error:
                raise self.failed(pending, pending.peers, str(error)) from error
        return pending

    def _words(self, own: str, wait: float) -> dict[int, str] | None:
        """Leaves word in the job's store, and returns that of other ranks, for which it waits so many
        seconds; None where the store does not answer. In a thread of its own: if the store's host is stopped,
        it never does."""
        words: dict[int, str] = {}
        answers: list[bool] = []
        others = [self.ranks[peer] for peer in self.peers]
        deadline = time.monotonic() + wait

        def ask() -> None:
            with suppress(RuntimeError, ValueError):
                store = self._store()
                store.set(str(self.own), own)
                while time.monotonic() < deadline and len(words) < len(others):
                    for rank in others:
                        if rank not in words and store.check([str(rank)]):
                            words[rank] = store.get(str(rank)).decode()
                    time.sleep(0.01)
                answers.append(True)

        worker = threading.Thread(target=ask, daemon=True)
        worker.start()
        worker.join(wait + SPARE)
        return dict(words) if answers else None

    def _store(self) -> PrefixStore:
        """Where ranks leave word."""
        return PrefixStore(f"attention/{self.group.group_name}", _get_default_store())


class Pending:
    """Messages that are on their way, and what holds their memory."""

    def __init__(self, transport: Transport, step: str, peers: list[int], tensors: list[Tensor]) -> None:
        self.transport, self.step, self.peers, self.tensors = transport, step, peers, tensors
        self.works: list[dist.Work] = []

    def wait(self) -> None:
        """Returns when all have arrived and left, or raises `DistributedError` at the call's deadline. For
        tensors on a device it is the current stream that waits; see the module."""
        on_cpu = all(x.device.type == "cpu" for x in self.tensors)
        works, self.works = self.works, []
        for number, work in enumerate(works):
            try:
                if on_cpu:
                    work.wait(self.transport.left)
                else:
                    work.wait()
            except RuntimeError as error:
                late = [number, *_unfinished(works, number + 1)] if on_cpu else range(len(self.peers))
                raise self.transport.failed(self, [self.peers[n] for n in late], str(error)) from error
        self.tensors = []


def _unfinished(works: Sequence[dist.Work], begin: int) -> Iterator[int]:
    """Which from `begin` on had not ended when an earlier one failed, which ended them all."""
    for number in range(begin, len(works)):
        try:
            works[number].wait(SHORTEST)
        except RuntimeError:
            yield number


def backends(group: dist.ProcessGroup) -> dict[str, str]:
    """The backend of each type of device that a group has."""
    config = dist.get_backend_config(group)
    return dict(part.split(":", 1) for part in config.split(",") if ":" in part)
