"""Several processes that train, evaluate or label together: those that torchrun started, one for each GPU.

Each takes its part of every batch; the first one alone speaks and writes the run's files, in a folder that all of them
see. With one process, no function here communicates.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.config.errors import UserError, reason

SLOW = timedelta(minutes=30)  # how long processes wait for one that downloads, or whose file system is slow
GONE = (
    "another process of this run has ended or cannot be reached; the same command, without train.restart=true, resumes "
    "the run"
)

_store: dist.Store | None = None  # that all processes see
_silence = contextlib.ExitStack()  # open while this process must not speak

# ------------------------------------------------------------------------------------------------ start and end


def start() -> None:
    """Join the other processes where a launcher has started several, by its RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT. All but the first fall silent.

    Raises:
        UserError: they do not meet.
    """
    global _store
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal():
        raise UserError(f"WORLD_SIZE={text!r} is set, but is no number of processes")
    number = int(text)
    if dist.is_initialized() or number < 2:
        return
    if missing := {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        message = f"WORLD_SIZE={number} is set, but not {', '.join(sorted(missing))}"
        print(f"warning: {message}: training in one process; see torchrun", file=sys.stderr)
        return
    # Tensors meet where they are: on GPUs by NCCL; on the host, as do flags and plain values, by Gloo.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        _store, rank, _ = next(dist.rendezvous("env://", timeout=SLOW))
        dist.init_process_group(backend, store=_store, rank=rank, world_size=number, timeout=SLOW)
    except (RuntimeError, ValueError) as error:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the {number} processes of this run do not meet at {at} ({reason(error)}): is the port in use, or the "
            "machine out of reach? torchrun's --master_addr and --master_port name others"
        ) from None
    if not is_main():
        silent = _silence.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        _silence.enter_context(contextlib.redirect_stdout(silent))


def end() -> None:
    """Leave the other processes, once all have come here."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()
        _silence.close()


def leave(status: int) -> None:
    """End this process. One of several does not wait for the others: the launcher ends them."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def first_to_print() -> bool:
    """Whether this process is the first that says why the run ends."""
    try:
        return not dist.is_initialized() or _store.add("ended", 1) == 1
    except RuntimeError:  # the process that keeps the store is gone
        return True


def others_are_gone(error: Exception) -> bool:
    """Whether an error in this process only means that another one has ended."""
    met = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl"))
    return dist.is_initialized() and (met or isinstance(error, dist.DistError))


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


def local_batch(batch: int) -> range:
    """Which samples of a global batch are this process's: a contiguous part, so that N processes train on the batches
    of one."""
    part = batch // world_size()
    return range(rank() * part, (rank() + 1) * part)


def shard_indices(length: int, batch: int) -> list[int]:
    """Which of `length` images this process takes: every N-th batch, so that batches are those of a single process."""
    return [i for i in range(length) if i // batch % world_size() == rank()]


# ----------------------------------------------------------------------------------------------------- exchanges


def wait() -> None:
    """Return when every process has come here."""
    largest(0)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The first process runs the block before the others, which find what it has made."""
    if not is_main():
        wait()
    try:
        yield
    finally:
        if is_main():
            wait()


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
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
    """Every process's value, by rank: anything that can be pickled, with tensors on the CPU."""
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


def merge_softmax_means() -> Callable[[Tensor, Tensor], Tensor] | None:
    """`merge` of `bidirectional_prototype_loss`: None for one process.

    A softmax over all pixels is the processes' own softmaxes, weighted by their sums of exponentials.
    """
    n, own = world_size(), rank()
    if n == 1:
        return None

    def merge(mass: Tensor, mean: Tensor) -> Tensor:
        part = torch.stack([mass, mean])
        every = [torch.empty_like(part) for _ in range(n)]
        dist.all_gather(every, part.detach())
        every[own] = part  # gradient reaches this process's own part alone
        masses, means = torch.stack(every).unbind(1)  # (processes, K)
        value = (masses.softmax(0) * means).sum(0)
        # The step averages gradients over N processes: times N, the average is the sum of all parts' gradients.
        return n * value - (n - 1) * value.detach()

    return merge


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
