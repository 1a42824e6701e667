"""The processes of a run: the accelerator they share, how they divide a batch, and what they must agree upon.

accelerate is used here and in loop.py, and nowhere else: device, precision, process group, gradient synchronisation.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor

from ldm import ranges
from ldm.config import LoopConfig
from ldm.errors import UserError, kind_and_line
from ldm.locks import held
from ldm.training.rendezvous import PATIENCE, join
from ldm.training.stage import Batches


@dataclass(frozen=True)
class Division:
    """How a global batch is divided: global = processes * accumulation * micro."""

    processes: int
    accumulation: int
    micro: int

    @property
    def share(self) -> int:
        """Samples of one optimizer step in one process."""
        return self.accumulation * self.micro


def divide(loop: LoopConfig, processes: int) -> Division:
    """Raises UserError if the global batch cannot be divided as asked."""
    ranges.check(loop, prefix="loop.")
    share, rest = divmod(loop.global_batch, processes)
    micro = loop.micro_batch or share
    if rest or share % micro:
        raise UserError(
            f"loop.global_batch={loop.global_batch} is not {processes} processes times a multiple of "
            f"loop.micro_batch={micro}; change one of them"
        )
    return Division(processes, share // micro, micro)


def make_accelerator(loop: LoopConfig, output: Path) -> Accelerator:
    """The accelerator of a run; raises UserError for settings that cannot work, or not on this machine."""
    _check(loop)
    precision = precision_here(loop.precision)
    join()
    world = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(
        # Unless told that it is on CPUs, accelerate makes of each of several processes a run of its own there.
        cpu=world > 1 and not torch.accelerator.is_available(),
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(loop.trackers) or None,
        project_dir=output,
        kwargs_handlers=[
            # No network here has buffers that change: what DDP would send before every step is constant.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),  # where `join` has made no group yet
        ],
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "DeepSpeed's engine keeps optimizer and weights to itself; spread them by FSDP (docs/training.md)"
        )
    if accelerator.num_processes < world:
        raise UserError(f"{world} processes were launched, of which accelerate joins {accelerator.num_processes}")
    if accelerator.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(loop.threads or max(1, _cores() // local))
    return accelerator


def open_trackers(accelerator: Accelerator, loop: LoopConfig, said: Mapping[str, Any]) -> None:
    """Begin the run of these settings in `loop.trackers`. Raises UserError where one asks for what is not there."""
    try:
        accelerator.init_trackers("ldm", dict(said))
    except Exception as error:  # each has its own: no login, no network, a folder that cannot be written
        raise UserError(
            f"loop.trackers={','.join(loop.trackers)} cannot be opened ({kind_and_line(error)}); set that up, or leave "
            "loop.trackers out"
        ) from error


def precision_here(precision: str) -> str:
    """fp32, bf16 or fp16; auto is bf16 on a GPU that computes in it, else fp32. Raises UserError for fp16 on CPUs."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("loop.precision=fp16 needs a GPU; use bf16 or fp32 on this machine")
    if precision == "auto":
        # A CPU says that it can, and most then take hundreds of times as long as in float32.
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "fp32"
    return precision


def _check(loop: LoopConfig) -> None:
    ranges.check(loop, prefix="loop.")
    for name in loop.trackers:
        if importlib.util.find_spec(name) is None:  # accelerate would track nothing and say nothing
            raise UserError(f"loop.trackers names {name}, which is not installed; pip install -e '.[track]'")


def _cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def agree(numbers: Sequence[int], accelerator: Accelerator) -> list[int]:
    """Of each number the largest of any process: what one was told, all do at the same step, or they would hang."""
    if accelerator.num_processes == 1:
        return list(numbers)
    gathered = accelerator.gather(torch.tensor([list(numbers)], device=accelerator.device))
    assert isinstance(gathered, Tensor)
    return gathered.max(dim=0).values.tolist()


def check_order(batches: Batches, accelerator: Accelerator) -> None:
    """Raise UserError, on all processes, unless they are about to divide one order of samples among them.

    A process that sees other shards, or could not open one of them, would repeat some samples and leave out others.
    """
    orders = [{**state, **state.get("order", {})} for state in from_all(batches.state_dict(), accelerator)]
    for rank, order in enumerate(orders):
        other = [name for name in order if name != "order" and order[name] != orders[0].get(name)]
        if other:
            raise UserError(
                f"process {rank} reads another order of samples than process 0 ({', '.join(other)} differ); let all of "
                "them see the same shards and settings, and start again"
            )


@contextmanager
def writing_alone(output: Path, accelerator: Accelerator) -> Iterator[None]:
    """Let no other run write into `output` while the block runs; raises UserError, on all processes, if one does."""
    with ExitStack() as stack:
        wrong = ""
        try:
            if accelerator.is_main_process:
                stack.enter_context(held(output))
        except UserError as error:
            wrong = str(error)
        if wrong := from_main(wrong, accelerator):
            raise UserError(wrong)
        yield


def from_main(value: Any, accelerator: Accelerator) -> Any:
    """What the main process has; a plain number, string or container of them."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def from_all(value: Any, accelerator: Accelerator) -> list[Any]:
    """What each process has, in their order."""
    return [value] if accelerator.num_processes == 1 else gather_object([value])
