"""The ranks of a run: who leads, what all of them add up, what the leader tells the others. Alone it is all nothing.

Rank 0 leads: it reads text, decides, writes and talks. The others do as they are told, in the same order. Numbers of a
step travel by the device's own backend, words and rows from host to host by gloo, as JSON and as integers: no pickle.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moelet.errors import TemporaryError, UserError
from moelet.parallel.started import started_rank, started_ranks

JOIN_SECONDS = 300.0  # for all ranks to come to where they meet: some load torch from a slow disk
STORE_SECONDS = 10.0  # for an answer of the store where they met: then its process is gone
PATIENCE = timedelta(days=7)  # of collectives: a leader may wait for a hub or a disk. `parallel.watch` finds the dead
POLL_SECONDS = 0.05
LOST = "lost"  # the key of the words for what rank was lost, and how
BUFFER = 4096  # bytes of a message that goes in one piece


class Lost(TemporaryError):
    """Another rank doesn't answer any more."""


class Team:
    """The ranks of a run, seen by one of them. Alone it has one, and every method is that of a sum of one."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.told = False  # whether the leader has ordered anything yet

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def order(self, what: str, **details: Any) -> None:
        """Have the other ranks do something, while this one, the leader, does the same."""
        assert self.leads
        if not self.alone:
            self.share(json.dumps({"do": what, **details}).encode())
            self.told = True

    def ordered(self) -> dict[str, Any]:
        """Return what the leader has ordered next."""
        order: dict[str, Any] = json.loads(self.share(None))
        return order

    def share(self, data: bytes | None) -> bytes:
        """Return the leader's bytes, on every rank."""
        if self.alone:
            assert data is not None
            return data
        buffer = torch.zeros(BUFFER, dtype=torch.uint8)
        if data is not None:
            head = len(data).to_bytes(8, "little") + data[: BUFFER - 8]
            buffer[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        with answering():
            dist.broadcast(buffer, 0)
        raw = buffer.numpy().tobytes()
        length, first = int.from_bytes(raw[:8], "little"), raw[8:]
        if length <= len(first):
            return first[:length]
        rest = torch.zeros(length - len(first), dtype=torch.uint8)
        if data is not None:
            rest = torch.frombuffer(bytearray(data[len(first) :]), dtype=torch.uint8)
        with answering():
            dist.broadcast(rest, 0)
        return first + rest.numpy().tobytes()

    def gathered(self, item: Any) -> list[Any]:
        """Return what each rank gives, in the order of ranks, as JSON has it; all ranks call this."""
        if self.alone:
            return [item]
        raw = json.dumps(item).encode()
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(raw)
        with answering():
            dist.all_reduce(sizes)
            mine = torch.zeros(int(sizes.max()), dtype=torch.uint8)
            mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            every = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(every, mine)
        return [json.loads(row.numpy().tobytes()[:n]) for row, n in zip(every, sizes.tolist(), strict=True)]

    def post(self, key: str, item: Any) -> None:
        """Leave word for the leader, which JSON can hold, from any thread."""
        meeting_place().set(f"{key}/{self.rank}", json.dumps(item))

    def posted(self, key: str) -> list[Any]:
        """Return what each other rank has posted, once all have, in any thread; `parallel.watch` ends waiting for a
        rank that is lost."""
        store, keys = meeting_place(), [f"{key}/{rank}" for rank in range(1, self.size)]
        while not store.check(keys):
            time.sleep(POLL_SECONDS)
        return [json.loads(store.get(place)) for place in keys]

    def give_up(self, error: BaseException) -> None:
        """Tell all ranks that this one ends, and why; `parallel.watch` ends them."""
        first = (str(error).splitlines() or [""])[0]
        meeting_place().set(LOST, f"rank {self.rank} ended with {type(error).__name__}: {first[:300]}.")

    def dealt(self, hands: list[Tensor] | None, shape: list[int]) -> Tensor:
        """Return this rank's part of what the leader deals out: a tensor of `shape`, int32, on the host."""
        mine = torch.empty(shape, dtype=torch.int32)
        with answering():
            dist.scatter(mine, hands, 0)
        return mine

    def total(self, *counts: int) -> list[int]:
        """Return the sums of counts over all ranks."""
        if self.alone:
            return list(counts)
        sums = torch.tensor(counts, dtype=torch.int64)
        with answering():
            dist.all_reduce(sums)
        return [int(value) for value in sums]

    def highest(self, *counts: int) -> list[int]:
        """Return the maxima of counts over all ranks."""
        if self.alone:
            return list(counts)
        most = torch.tensor(counts, dtype=torch.int64)
        with answering():
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return [int(value) for value in most]

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks; equal to the last bit on each of them."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """Return the maximum over all ranks."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        if self.alone:
            return tensor
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        with answering():
            dist.all_reduce(result, how)
        return result


ALONE = Team()


def join() -> Team:
    """Return the ranks that this process was started with, once all of them are here.

    Where to meet is in the environment, as torchrun sets it. Each rank takes its card, or its share of the cores.
    Raises UserError where there are fewer cards than ranks, Lost where some don't come.
    """
    if started_ranks() == 1:
        return ALONE
    local, of = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        if of > torch.cuda.device_count():
            raise UserError(
                f"{of} ranks were started on a machine with {torch.cuda.device_count()} cards. Each needs one of its "
                f"own. Start torchrun --nproc-per-node {torch.cuda.device_count()}."
            )
        torch.cuda.set_device(local)
    else:  # torchrun says one thread a rank, whatever the machine has
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // of))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    rank, size = started_rank(), started_ranks()
    with answering():
        store = meeting_place(hosts=rank == 0)
        _await_all(store, rank, size)  # with a limit; from here on there is none
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    return Team(rank, size)


def meeting_place(hosts: bool = False) -> dist.Store:
    """Return the store where the ranks of this start, or start after a failure, meet, by a connection of its own.

    Under torchrun that is torchrun's; else the first rank `hosts` it.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = hosts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    seconds = timedelta(seconds=JOIN_SECONDS if hosts else STORE_SECONDS)
    store = dist.TCPStore(address, port, is_master=hosts, timeout=seconds, wait_for_workers=False)
    return dist.PrefixStore(f"moelet-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _await_all(store: dist.Store, rank: int, size: int) -> None:
    """Wait until all ranks are here. Raises Lost, naming those who aren't."""
    store.set(f"here/{rank}", "1")
    places = [f"here/{other}" for other in range(size)]
    limit = time.monotonic() + JOIN_SECONDS
    while missing := [place for place in places if not store.check([place])]:
        if time.monotonic() > limit:
            names = ", ".join(place.removeprefix("here/") for place in missing)
            raise Lost(f"of {size} ranks {names} didn't come within {JOIN_SECONDS:.0f} s. Start all of them again.")
        time.sleep(POLL_SECONDS)


def leave(team: Team) -> None:
    """Give up the connections to the other ranks."""
    if not team.alone and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Turn what torch says of a rank that went away into `Lost`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, Lost) or not is_lost(error):
            raise
        raise Lost(f"another rank doesn't answer ({str(error).splitlines()[0][:200]})") from error


def is_lost(error: BaseException | None) -> bool:
    """Whether an error is what torch says of a rank that went away."""
    broken = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    return broken or isinstance(error, Lost)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this rank; all of it, where it isn't sharded. Shares its memory."""
    to_local = getattr(tensor, "to_local", None)  # a DTensor's; asked like this, nobody alone waits for its import
    part: Tensor = tensor if to_local is None else to_local()
    return part


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is one whose parts, or copies, torch keeps together over ranks."""
    return hasattr(tensor, "to_local")


def rows_here(parameter: Tensor) -> slice:
    """Return which rows of a parameter lie on this rank: FSDP2 divides them as torch.chunk does."""
    if (mesh := getattr(parameter, "device_mesh", None)) is None:
        return slice(None)
    each = math.ceil(parameter.shape[0] / mesh["shard"].size())
    start = min(parameter.shape[0], mesh.get_local_rank("shard") * each)
    return slice(start, min(parameter.shape[0], start + each))


def gathered(parameter: Tensor, values: Tensor) -> Tensor:
    """Return all of a matrix of which each rank gives the rows of `parameter` that it has; a stack's as they are."""
    if parameter.ndim != 2 or values.shape == parameter.shape:
        return values
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    whole = DTensor.from_local(
        values, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    return whole.full_tensor()
