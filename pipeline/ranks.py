"""Processes that do one piece of work together: torch.distributed, as torchrun starts it.

Every rank runs the same program on the same seed and comes to the same decisions; what differs is which part
of the arithmetic it does. So nothing but sums travels, and `agree` checks by hash that the decisions really
were the same. Rank 0 alone owns the run folder; the others get what they read from there by broadcast, and
need no file system in common with it.

    torchrun --nproc-per-node 4 -m pipeline search --out exports/photos

Tensors on a CPU travel by gloo, tensors on a GPU by NCCL. A rank that dies closes its connections, which ends
the others at once (on GPUs, when torchrun notices); one that lives and does not answer ends them after
BUDGETLINE_RANKS_TIMEOUT seconds, by default 600.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BudgetlineError, ConfigError, RankLost, RanksDisagree
from pipeline.types import Arrays, Checkpoint, FloatArray, Json

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT_S = 600
"""How long a rank waits for the others: longer than any of them works alone between two sums."""

TIMEOUT_VARIABLE = "BUDGETLINE_RANKS_TIMEOUT"


class Ranks(Protocol):
    """The processes that share this work. Every rank makes the same calls in the same order.

    Raises RankLost where another rank does not answer any more."""

    @property
    def rank(self) -> int:
        """Which of them this process is, from 0."""
        ...

    @property
    def size(self) -> int: ...

    def sum(self, values: Tensor) -> None:
        """Replace by the sum over all ranks, in place; the same bits everywhere."""
        ...

    def sum_in_order(self, own_ML: Tensor, owners: Sequence[int]) -> Tensor:
        """The sum of vectors that different ranks have, added one after the other: the same bits however many
        ranks there are. `owners` says whose each is, in order; a rank gives its own, in order, as the rows of
        `own_ML`, whose length L all ranks divide evenly. Shape (L,)."""
        ...

    def send(self, values: Tensor, source: int) -> Callable[[], None]:
        """Begin to replace by what rank `source` has, in place; calling what comes back waits for it."""
        ...

    def sum_array(self, values: FloatArray) -> FloatArray:
        """The sum over all ranks; exact where an entry is zero on all of them but one."""
        ...

    def from_first(self, content: bytes) -> bytes:
        """What rank 0 has."""
        ...

    def agree(self, where: str, digests: Mapping[str, str]) -> None:
        """Raises RanksDisagree, on every rank, where the digests of one name differ."""
        ...


class Alone:
    """Implements `Ranks` for one process."""

    rank, size = 0, 1

    def sum(self, values: Tensor) -> None:
        pass

    def sum_in_order(self, own_ML: Tensor, owners: Sequence[int]) -> Tensor:
        return _folded(list(own_ML))

    def send(self, values: Tensor, source: int) -> Callable[[], None]:
        return _nothing

    def sum_array(self, values: FloatArray) -> FloatArray:
        return values

    def from_first(self, content: bytes) -> bytes:
        return content

    def agree(self, where: str, digests: Mapping[str, str]) -> None:
        pass


ALONE: Ranks = Alone()


def _nothing() -> None:
    pass


def _folded(vectors: Sequence[Tensor]) -> Tensor:
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    return total


class Group:
    """Implements `Ranks` on torch's default process group, which must be there."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, values: Tensor) -> None:
        import torch.distributed as dist

        dist.all_reduce(values)

    def sum_in_order(self, own_ML: Tensor, owners: Sequence[int]) -> Tensor:
        """Each rank adds up one part of the vectors, for which the others send it theirs, and gives the sum
        to all. With one vector on each rank that is the traffic of a ring's sum, with M of them (M + 1)/2
        times as much."""
        import torch.distributed as dist

        num, length = own_ML.shape
        part = length // self.size
        sent = own_ML.view(num, self.size, part).transpose(0, 1).reshape(-1)
        received = own_ML.new_empty(len(owners) * part)
        counts = [owners.count(rank) * part for rank in range(self.size)]
        dist.all_to_all_single(received, sent, counts, [num * part] * self.size)
        by_rank = sorted(range(len(owners)), key=lambda piece: owners[piece])
        pieces = dict(zip(by_rank, received.view(len(owners), part), strict=True))
        whole = own_ML.new_empty(length)
        dist.all_gather_into_tensor(whole, _folded([pieces[piece] for piece in range(len(owners))]))
        return whole

    def send(self, values: Tensor, source: int) -> Callable[[], None]:
        import torch.distributed as dist

        work = dist.broadcast(values, src=source, async_op=True)

        def wait() -> None:
            assert work is not None
            work.wait()

        return wait

    def sum_array(self, values: FloatArray) -> FloatArray:
        import torch

        summed = torch.from_numpy(values.copy())
        self.sum(summed)
        return np.asarray(summed.numpy())

    def from_first(self, content: bytes) -> bytes:
        import torch

        length = torch.tensor([len(content)])
        self.send(length, 0)()
        if self.rank != 0:
            content = bytes(int(length))
        received = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)
        self.send(received, 0)()
        return received.numpy().tobytes()[: int(length)]

    def agree(self, where: str, digests: Mapping[str, str]) -> None:
        import torch
        import torch.distributed as dist

        own = b"".join(hashlib.sha256(digest.encode()).digest()[:8] for digest in digests.values())
        sent = torch.frombuffer(bytearray(own), dtype=torch.int64)
        all_RD = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(all_RD, sent)
        refuse_differences(where, list(digests), torch.stack(all_RD).numpy())


def refuse_differences(where: str, names: Sequence[str], found_RD: NDArray[np.int64]) -> None:
    """Compare the digests of all ranks, a row each, with those of rank 0. Raises RanksDisagree."""
    differs_RD = found_RD != found_RD[0]
    if differs_RD.any():
        what = " and ".join(names[place] for place in np.flatnonzero(differs_RD.any(axis=0)).tolist())
        who = ", ".join(map(str, np.flatnonzero(differs_RD.any(axis=1))))
        raise RanksDisagree(
            f"{where}: not the same on rank {who} as on rank 0: {what}; start all ranks with the same "
            "command, versions, data and kind of machine; the last checkpoint is kept"
        )


# ---------------------------------------------------------------------------------------------------- meeting


class Place(NamedTuple):
    """What torchrun tells a process: which rank it is of how many, and which of those on its machine."""

    rank: int
    size: int
    local_rank: int


def place_in(environment: Mapping[str, str]) -> Place:
    """Rank 0 of one where nothing was told. Raises ConfigError."""
    told = [environment.get(name, other) for name, other in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    told.append(environment.get("LOCAL_RANK", told[0]))
    if not all(word.isdecimal() for word in told) or not int(told[0]) < int(told[1]):
        raise ConfigError(
            f"RANK, WORLD_SIZE and LOCAL_RANK are {', '.join(told)}: start several ranks with torchrun, or "
            "clear these variables"
        )
    return Place(*map(int, told))


def timeout_in(environment: Mapping[str, str]) -> timedelta:
    stated = environment.get(TIMEOUT_VARIABLE) or str(TIMEOUT_S)
    if not stated.isdecimal() or not 0 < int(stated) < 10**6:
        raise ConfigError(f"{TIMEOUT_VARIABLE} is '{stated}'; expected whole seconds, such as 600")
    return timedelta(seconds=int(stated))


@contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The ranks that torchrun started, once all of them are there; without torchrun this process alone.

    What is raised inside says which rank it was on; a lost connection, or torchrun's request to end, is a
    RankLost."""
    place = place_in(environment)
    if place.size == 1:
        yield ALONE
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        with _on_rank(place):
            _meet(place, timeout_in(environment))
            yield Group()
            _part()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _on_rank(place: Place) -> Iterator[None]:
    try:
        yield
    except BudgetlineError as error:
        raise type(error)(f"{_of(place)}: {error}") from None
    except RuntimeError as failure:
        if not _is_lost_connection(failure):
            raise
        raise RankLost(f"{_of(place)}: {_LOST} ({str(failure).splitlines()[0]}); {_AGAIN}") from None


_LOST = "another rank has died or does not answer; its own message comes before or after this one"
_AGAIN = "the last checkpoint is kept: start the same command again, with as many ranks as you like"


def _of(place: Place) -> str:
    return f"rank {place.rank} of {place.size}"


def _end(number: int, frame: object) -> None:
    """torchrun's way to end the ranks that are left when one has failed."""
    raise RankLost(f"was told to end, since another rank has failed or the job was stopped; {_AGAIN}")


def _is_lost_connection(failure: RuntimeError) -> bool:
    """gloo has no exception of its own: its plain RuntimeErrors begin with where in its source they arose."""
    from torch.distributed import DistError

    return isinstance(failure, DistError) or "gloo" in str(failure).lower()


def _meet(place: Place, timeout: timedelta) -> None:
    import torch
    import torch.distributed as dist

    with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if with_gpus and place.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(place.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo", timeout=timeout)


def _part() -> None:
    """Only when all went well: a group that has lost a member may wait for it here."""
    import torch.distributed as dist

    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ sharing out


def share_out(loads: Sequence[float], size: int) -> list[int]:
    """Which of `size` ranks takes which piece: the heaviest first, each to the rank with the least so far.

    The same on every rank; the busiest has at most 4/3 of the least possible (Graham 1969)."""
    taken, owners = [0.0] * size, [0] * len(loads)
    for piece in sorted(range(len(loads)), key=lambda piece: -loads[piece]):
        owners[piece] = min(range(size), key=lambda rank: taken[rank])
        taken[owners[piece]] += loads[piece]
    return owners


def part_of(num: int, ranks: Ranks) -> slice:
    """This rank's part of `num` things in order; parts differ by one at most."""
    return slice(num * ranks.rank // ranks.size, num * (ranks.rank + 1) // ranks.size)


# ------------------------------------------------------------------------------------------- what rank 0 owns


@dataclass(frozen=True)
class SharedCheckpoint:
    """Implements `Checkpoint`: rank 0 alone writes, and what it reads reaches all ranks."""

    kept: Checkpoint
    ranks: Ranks

    _RECORD = "__record__"

    def load(self) -> tuple[Arrays, Json] | None:
        if self.ranks.size == 1:
            return self.kept.load()
        loaded = self.kept.load() if self.ranks.rank == 0 else None
        content = b"" if loaded is None else pack({**loaded[0], self._RECORD: _of_json(loaded[1])})
        received = self.ranks.from_first(content)
        if not received:
            return None
        arrays = unpack(received)
        return arrays, _to_json(arrays.pop(self._RECORD))

    def save(self, arrays: Mapping[str, NDArray[Any]], record: Json) -> None:
        if self.ranks.rank == 0:
            self.kept.save(arrays, record)


def pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def unpack(content: bytes) -> Arrays:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _of_json(record: Json) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(record).encode(), dtype=np.uint8)


def _to_json(content: NDArray[Any]) -> Json:
    record: Json = json.loads(content.tobytes())
    return record
