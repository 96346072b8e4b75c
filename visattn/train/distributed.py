"""The processes of a run (torchrun, Slurm, or one): who this one is, what all agree on, how they share the model."""

import gc
import inspect
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its defaults hold the group that is there when it is first imported
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask
from timm.utils import unwrap_model
from timm.utils.distributed import is_distributed_env, world_info_from_env
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from visattn.train.config import Config
from visattn.train.errors import ConfigError, PeerError, TrainError, shown
from visattn.weights import first_line

# The attributes in which timm's models and ours hold their repeated blocks.
BLOCKS = re.compile(r"(blocks?|focus|layers?|levels?|stages?)_?\d*")
# What gloo and NCCL say when a process has left, or has not answered in time.
PEER_LOST = re.compile(r"closed by peer|timed? ?out|reset by peer|gloo|nccl|socket|broken pipe", re.IGNORECASE)


_store: dist.Store | None = None  # of the process group


@dataclass(frozen=True)
class World:
    """This process among its `size` peers. All ranks must call every method but the properties together."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """True in the one process that writes and speaks."""
        return self.rank == 0

    def total(self, values: list[torch.Tensor | float]) -> list[float]:
        """Sums over all processes; one collective and one synchronization with the device."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        vector = torch.stack([torch.as_tensor(value, dtype=dtype, device=self.device) for value in values])
        if self.size > 1:
            dist.all_reduce(vector)
        return vector.tolist()

    def gather(self, value: Any) -> list[Any]:
        """A small object from every process, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Let one process act, and all share what came of it: a small object, or the TrainError."""
        outcome = None
        if self.main:
            try:
                outcome = action()
            except TrainError as error:
                outcome = error
        outcome = self.gather(outcome)[0]
        if isinstance(outcome, TrainError):
            raise outcome
        return outcome

    def merge(self, flags: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags

    def average_batch_norm(self, model: nn.Module) -> None:
        """Give all processes the mean of their running statistics, so that they hold one state after every update."""
        if self.size == 1:
            return
        # Those of frozen modules are equal as they are; the mean of three could round them to other values.
        own = (item for module in model.modules() if module.training for item in module.named_buffers(recurse=False))
        stats = [buffer for name, buffer in own if name in ("running_mean", "running_var")]
        if stats:
            flat = torch.cat([buffer.flatten() for buffer in stats])
            dist.all_reduce(flat)
            flat /= self.size
            parts = flat.split([buffer.numel() for buffer in stats])
            torch._foreach_copy_(stats, [part.view_as(buffer) for part, buffer in zip(parts, stats, strict=True)])


def start(config: Config) -> World:
    """Join the process group that the environment describes, if it does, and pick this process's device."""
    global _store
    local_rank, rank, size = world_info_from_env() if is_distributed_env() else (0, 0, 1)
    if size > 1:
        for variable, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", size)):
            os.environ.setdefault(variable, str(value))  # Slurm names them otherwise
        if "MASTER_ADDR" not in os.environ:
            raise ConfigError(
                f"expected MASTER_ADDR and MASTER_PORT for {size} processes, got no address; try torchrun, or to "
                "export both in the Slurm script"
            )
        # torchrun keeps its store over restarts: without a prefix, processes would read addresses of their dead peers.
        attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{size}"
        timeout = timedelta(seconds=config.dist_timeout)
        try:
            store, *_ = next(rendezvous("env://", timeout=timeout))
            _store = dist.PrefixStore(f"train/{attempt}", store)
            device = _pick_together(_store, config.device, local_rank, rank, size)
            backend = "cpu:gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=timeout)
        except ConfigError:
            raise
        except (RuntimeError, ValueError) as error:
            raise PeerError(f"expected {size} processes that meet, got: {error}; try another MASTER_ADDR") from error
        return World(rank, size, device)
    return World(rank, size, pick_device(config.device))


def first_to_say(text: str) -> bool:
    """True in one of the processes that have the same to say; before they meet, in one of each node."""
    local_rank, rank, _ = world_info_from_env()
    if _store is None:
        return local_rank == 0
    try:
        return _store.compare_set(f"said/{text}", "", str(rank)) == str(rank).encode()
    except RuntimeError:  # the process that holds the store has gone, and was not silent
        return False


def _pick_together(store: dist.Store, name: str, local_rank: int, rank: int, size: int) -> torch.device:
    """This process's device; if one process has none, all raise."""
    device, problem = None, ""
    try:
        device = pick_device(name, local_rank)
    except ConfigError as error:
        problem = str(error)
    store.set(f"device/{rank}", problem)
    problems = [text for text in store.multi_get([f"device/{peer}" for peer in range(size)]) if text]
    store.set(f"read/{rank}", "")
    if device is None or problems:
        if rank == 0:  # which holds the store, and now ends
            store.wait([f"read/{peer}" for peer in range(size)])
        raise ConfigError(problems[0].decode())
    return device


def stop() -> None:
    """Leave the process group once nothing else holds it, a model in DDP neither: its threads end with it.

    A thread of gloo that lets go of its last tensor after Python has ended aborts the process. Those of an FSDP2 run
    stay: PyTorch's caches of DTensor hold the group.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def peer_lost(error: BaseException) -> bool:
    """Is `error` how a collective reports that another process has gone?"""
    return dist.is_initialized() and isinstance(error, RuntimeError) and bool(PEER_LOST.search(str(error)))


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` or a torch device name, checked by a tensor there; one GPU per process of a node."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = (tensor := torch.zeros(1, device=name)).device
        tensor.tolist()  # which meta cannot
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"--device: expected a usable device, got {shown(name)} ({reason}); try --device cpu"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def prepare(task: TrainingTask, config: Config, world: World) -> None:
    """Average, compile and share the model of `task` as the options ask for, in the one order that works."""
    if config.sync_bn and world.size > 1:
        if world.device.type == "cpu":
            raise ConfigError("--sync-bn: expected GPUs, got cpu, where PyTorch has none; try without --sync-bn")
        task.trainable_module = convert_sync_batchnorm(task.trainable_module)
    sharded = config.engine == "fsdp2" and world.size > 1
    if config.ema_decay:
        # One by one where weights are sharded: running statistics are not, and no kernel takes both.
        task.setup_ema(config.ema_decay, use_warmup=config.ema_warmup, foreach=not sharded)
    model = unwrap_model(task.get_trainable_module())
    if config.compile:
        for module in list(repeated_blocks(model)) if sharded else [model]:
            module.compile()
    if sharded:
        mesh = init_device_mesh(world.device.type, (world.size,))
        averaged = [unwrap_model(task.get_trainable_module(ema=True))] if config.ema_decay else []
        for copy in (model, *averaged):
            for block in repeated_blocks(copy):
                fully_shard(block, mesh=mesh)
            fully_shard(copy, mesh=mesh)
    elif world.size > 1:
        # Buffers: World.average_batch_norm keeps them equal, for both engines alike.
        device_ids = [world.device] if world.device.type == "cuda" else None
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # PyTorch 2.13
        task.prepare_distributed(
            device_ids=device_ids, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        )


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that a network repeats, at the deepest level that its containers name."""
    found = False
    for name, child in model.named_children():
        if BLOCKS.fullmatch(name) and isinstance(child, (nn.Sequential, nn.ModuleList)):
            for block in child:
                inner = list(repeated_blocks(block))
                yield from inner or [block]
            found = True
    if not found:
        for child in model.children():
            yield from repeated_blocks(child)


def synchronize_gradients(task: TrainingTask, last: bool) -> Any:
    """Context of one forward and backward pass: gradients are summed over processes only in the `last` of an update."""
    model = task.trainable_module
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return torch.enable_grad() if last else task.no_sync()
