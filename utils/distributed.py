"""Several processes that train, evaluate or label together: those that torchrun started, one for each GPU.

Each takes its part of every batch; the first one alone speaks and writes the run's files, in a folder that all of them
see. Without torchrun, and with one process, every function here is an identity.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import UserError

MEET = timedelta(minutes=2)  # until all processes have met
SLOW = timedelta(hours=1)  # that one may let the others wait: for a download, or a file system
# Seconds between signs of life, and without one until a process counts as gone: before torchrun, which gives those that
# are left 30 seconds, ends them without a word.
BEAT, SILENCE = 2.0, 20.0
GRACE = 10.0  # seconds that a process may take to end by itself once the run has

GONE = (
    "a process of this run has ended or cannot be reached; the same command started again resumes the run, and --debug "
    "shows what else it may be"
)

_watch: _Watch | None = None
_starts = itertools.count()  # keys of an earlier group in the same store are not this one's


# ------------------------------------------------------------------------------------------------ start and end


def start() -> None:
    """Join the other processes where a launcher has started several: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are
    set then. Those but the first fall silent.

    Raises:
        UserError: they do not meet.
    """
    global _watch
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if dist.is_initialized() or not launched or int(os.environ["WORLD_SIZE"]) < 2:
        return
    # Tensors meet where they are: on GPUs by NCCL, on the host, as do flags and plain values, by Gloo.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=MEET))
        keys = f"pbal/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_starts)}"
        store = dist.PrefixStore(keys, store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=SLOW)
        own = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=MEET)
    except (RuntimeError, ValueError) as error:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes of this run do not meet at {at} ({reason}): is the port in use, "
            "or the machine out of reach? torchrun's --master_addr and --master_port name others"
        ) from None
    _watch = _Watch(dist.PrefixStore(f"{keys}/watch", own), number, size)
    _watch.start()
    if not is_main():
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def end() -> None:
    """Part from the other processes, when all have come this far."""
    global _watch
    if _watch:
        wait()
        _watch.done.set()
        _watch = None
        dist.destroy_process_group()
        sys.stdout = sys.__stdout__


def leave(status: int) -> None:
    """End this process with a status while others may be waiting for it: what they share cannot be put in order."""
    if _watch:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def first_to_say() -> bool:
    """Whether no other process has said yet why the run ends; call it when there is something to say."""
    try:
        return not _watch or _watch.store.add("ended", 1) == 1
    except RuntimeError:  # who keeps the store is gone
        return True


def others_are_gone(error: Exception) -> bool:
    """Whether an error means that another process has ended, rather than that something is wrong in this one."""
    met = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl"))
    return bool(_watch) and (met or isinstance(error, dist.DistError))


class _Watch(threading.Thread):
    """Notices that another process is gone: on GPUs those left would wait for it without an end.

    Slowness is no fault: what is watched are signs of life, which a thread of each process gives, not its progress.
    """

    def __init__(self, store: dist.Store, number: int, size: int):
        super().__init__(daemon=True)
        self.store, self.done = store, threading.Event()
        self.me, self.neighbour = f"alive/{number}", f"alive/{(number + 1) % size}"

    def run(self) -> None:
        beats, heard, ended = 0, time.monotonic(), None
        while not self.done.wait(BEAT):
            now = time.monotonic()
            try:
                self.store.add(self.me, 1)
                beats, before = self.store.add(self.neighbour, 0), beats
                if self.store.add("ended", 0):
                    ended = ended or now
            except RuntimeError:  # who keeps the store has ended: with the run, or before it
                if self.done.wait(BEAT):
                    return
                heard = 0.0
            else:
                heard = now if beats != before else heard
            if self.done.is_set():
                return
            if ended and now - ended > GRACE:
                leave(1)
            if not ended and now - heard > SILENCE:
                if first_to_say():
                    print(f"error: {GONE}", file=sys.stderr)
                leave(1)


# --------------------------------------------------------------------------------------------------- who is who


def rank() -> int:
    """This process's number, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that speaks and writes."""
    return rank() == 0


def own_gpu(device: str) -> str:
    """The GPU of this process among those of its machine.

    Raises:
        UserError: `device` names one GPU for all, or there are more processes than GPUs.
    """
    if world_size() == 1:
        return device
    if device != "cuda":
        raise UserError(f"device={device} is one GPU for {world_size()} processes: leave device=auto")
    local, here = int(os.environ.get("LOCAL_RANK", rank())), int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    gpus = torch.cuda.device_count()
    if here > gpus:
        raise UserError(f"{here} processes on a machine of {gpus} GPUs: start --nproc_per_node={gpus}, or device=cpu")
    return f"cuda:{local}"


# ------------------------------------------------------------------------------------------------- parts of work


def share(batch: int) -> range:
    """Which samples of a global batch are this process's: a contiguous part, so that the batches of N processes are
    those of one."""
    part = batch // world_size()
    return range(rank() * part, (rank() + 1) * part)


def deal(length: int, batch: int) -> list[int]:
    """Which of `length` images this process takes: whole batches in turn, so that each is predicted in the company
    that one process would predict it in."""
    return [i for i in range(length) if i // batch % world_size() == rank()]


# ----------------------------------------------------------------------------------------------------- exchanges


def wait() -> None:
    """Return when every process has come here."""
    largest(0)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The first process goes through the block before the others: what it makes there, they find."""
    if not is_main():
        wait()
    try:
        yield
    finally:
        if is_main():
            wait()


def largest(number: int) -> int:
    """Of every process's number."""
    if world_size() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def total(counts: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(counts)
    return counts


def average(tensors: Sequence[Tensor]) -> None:
    """Replace float32 tensors by their means over the processes, in one exchange.

    Every process must bring the same shapes in the same order.
    """
    if world_size() > 1 and tensors:
        flat = total(torch.cat([t.flatten() for t in tensors])).div_(world_size())
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(mean.view(tensor.shape))


def same_weights(networks: dict[str, nn.Module]) -> None:
    """Every process takes the first one's parameters and buffers."""
    if world_size() > 1:
        for network in networks.values():
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, 0)


def gathered(value: Any) -> list[Any]:
    """What every process brings, by rank: anything that can be pickled; tensors must be on the CPU."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def joined(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The global batch from every process's part."""
    if world_size() == 1:
        return batch
    parts = gathered({key: value.cpu() for key, value in batch.items()})
    return {key: torch.cat([part[key] for part in parts]) for key in batch}


def rows(x: Tensor) -> Tensor:
    """Every process's tensor, (N, *x.shape) by rank. Gradient reaches this process's own; see `shared`."""
    if world_size() == 1:
        return x[None]
    every = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(every, x.detach().contiguous())
    every[rank()] = x
    return torch.stack(every)


def shared(value: Tensor) -> Tensor:
    """`value`, with N times its gradient.

    For a value that every process computes alike from `rows`, each with the gradient by its own part alone: the mean of
    these over N processes, as the step takes it, is then the gradient by all of them.
    """
    n = world_size()
    return value if n == 1 else n * value - (n - 1) * value.detach()


def synchronized(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with BatchNorm over the global batch: on GPUs, where torch has it. Keys of the state dict stay.

    On CPUs each process normalises by its own part of the batch; running statistics are means over the processes.
    """
    if world_size() == 1 or device.type != "cuda":
        return network
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if "timm" in sys.modules:  # whose BatchNorm may hold an activation
        from timm.layers import convert_sync_batchnorm as convert
    return convert(network)
