"""Runs in processes of their own, forked from one that has imported everything: they start in milliseconds.

In the folder tests:

python -m training.crew kills OUTPUT KILLS       a run killed with -9 that often, each time gone on with
python -m training.crew pair OUTPUT KILLS        the same with two processes, which die one after the other
python -m training.crew worlds OUTPUT            the same global batch on 1, 2 and 4 processes
python -m training.crew elastic OUTPUT           begun on 2 processes and gone on with on 1, and the other way round
python -m training.crew trouble OUTPUT           2 processes of which the second has a trouble of its own
python -m training.crew spread OUTPUT            FSDP2 on 2 processes, and on 2 and then 4
python -m training.crew strangers OUTPUT         2 processes that see different shards
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType

from ldm.config import DiffusionTraining
from ldm.errors import UserError
from ldm.locks import held
from ldm.training.loop import _Run, train
from ldm.training.processes import from_main, make_accelerator
from ldm.training.stage_two import DiffusionStage, diffusion_stage

from .test_combinations import PLAIN
from .toys import CPU, ICONS, LOOP, RowBatches, Rows, ToyStage, run

# Two reader processes, accumulation, epochs that end within the run, states and log lines at different steps.
DIFFUSION = replace(
    PLAIN,
    data=replace(PLAIN.data, workers=2, shuffle=20),
    loop=replace(LOOP, steps=100, micro_batch=4, log_every=3, save_every=2, validate_every=50, ema_widths=(0.1,)),
)
WIDE = replace(LOOP, steps=8, global_batch=16, micro_batch=4, log_every=1)


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        with suppress(OSError):  # the child may have done it, and may have ended
            os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)  # a group of its own: its reader processes are killed with it, as by a batch queue
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def begun(world: int, work: Callable[[int], None]) -> list[int]:
    """Fork `world` processes that find each other as torchrun's do; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def member(rank: int) -> Callable[[], None]:
        def begin() -> None:
            if world > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world)}
            work(rank)

        return begin

    return [fork(member(rank)) for rank in range(world)]


def crew(world: int, work: Callable[[int], None]) -> list[int]:
    """`begun`, and their exit codes when they have ended."""
    return ended(begun(world, work))


def ended(children: Sequence[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def marked(config: DiffusionTraining, rank: int, world: int, mark: Path) -> DiffusionStage:
    """A stage that leaves a mark when its first step begins."""
    stage = diffusion_stage(config, rank, world, CPU)
    losses = stage.losses

    def marking(*arguments: Any) -> Any:
        mark.touch()
        return losses(*arguments)

    stage.losses = marking
    return stage


def train_diffusion(output: Path) -> None:
    stage = marked(DIFFUSION, 0, 1, output.with_suffix(".began"))
    run(stage, DIFFUSION.loop, output, DIFFUSION)


def kills(output: Path, count: int) -> None:
    """Whole, and killed: each fourth time at a random moment of its start, else within the time of two steps."""
    output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    assert crew(1, lambda _: train_diffusion(output / "whole")) == [0]
    ended = time.monotonic()
    each = (ended - begun) / DIFFUSION.loop.steps
    mark, state = output / "killed.began", output / "killed" / "state"
    rng = random.Random(0)
    for number in range(count):
        mark.unlink(missing_ok=True)
        child = fork(lambda: train_diffusion(output / "killed"))
        if number % 4 == 0:
            time.sleep(rng.uniform(0, 4 * each))
        else:
            while not mark.exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 2 * each))
        os.killpg(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == -signal.SIGKILL, f"it ended with {code} before kill {number}"
        if state.exists():
            print(f"kill {number}: {sorted(path.name for path in state.glob('*.pt'))[-1:]}", flush=True)
    assert crew(1, lambda _: train_diffusion(output / "killed")) == [0]
    print(f"kills {count}")


class Shares(RowBatches):
    """A process' rows of each global batch."""

    def __init__(self, size: int, rank: int, world: int) -> None:
        super().__init__(size)
        self.rank, self.share = rank, size // world

    def __iter__(self):
        for batch in super().__iter__():
            own = slice(self.rank * self.share, (self.rank + 1) * self.share)
            yield Rows(batch.x[own], batch.key[own], batch.epoch[own])


def train_rows(output: Path, rank: int, steps: int = WIDE.steps) -> None:
    """In float64, where rounding cannot hide a wrong mean. Weights and averages of each process are kept."""
    loop = replace(WIDE, steps=steps)
    accelerator = make_accelerator(loop, output)
    stage = ToyStage(loop, dtype=torch.float64)
    stage.batches = Shares(loop.global_batch, rank, accelerator.num_processes)
    run = _Run(stage, loop, accelerator, output, loop)
    run.go_on()
    torch.save([*stage.weights(), *run.members.averages["net"].average.values()], output / f"weights-{rank}.pt")


def train_pair(output: Path, rank: int) -> None:
    loop = replace(DIFFUSION.loop, steps=24, log_every=1)
    config = replace(DIFFUSION, data=replace(DIFFUSION.data, workers=1), loop=loop)
    accelerator = make_accelerator(loop, output)
    stage = marked(config, rank, accelerator.num_processes, output.with_suffix(".began"))
    run = _Run(stage, loop, accelerator, output, config)
    run.go_on()
    averages = [*run.members.averages.values(), *run.members.profiles.values()]
    torch.save([average.state_dict() for average in averages], output / f"averages-{rank}.pt")


def pair(output: Path, count: int) -> None:
    """Whole, and killed: each third time at a random moment of the start, else within the time of four steps."""
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    assert crew(2, lambda rank: train_pair(output / "whole", rank)) == [0, 0]
    each = (time.monotonic() - began) / 24
    mark, rng = output / "killed.began", random.Random(0)
    for number in range(count):
        mark.unlink(missing_ok=True)
        children = begun(2, lambda rank: train_pair(output / "killed", rank))
        while number % 3 and not mark.exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 4 * each))
        for child in rng.sample(children, 2):
            os.killpg(child, signal.SIGKILL)
            time.sleep(rng.uniform(0, 0.01))
        # The second may have seen the first one go, and have ended by itself before its turn.
        codes = ended(children)
        assert -signal.SIGKILL in codes and 0 not in codes, codes
        print(f"kill {number}: {codes} {sorted(p.name for p in (output / 'killed').glob('state/*.pt'))}", flush=True)
    assert crew(2, lambda rank: train_pair(output / "killed", rank)) == [0, 0]
    print(f"kills {count}")


class Troubled(Shares):
    """From the fifth batch on the second process has the `trouble` of its class."""

    trouble: Callable[[], None]

    def __iter__(self):
        for batch in super().__iter__():
            if self.rank and self.drawn > 4:
                type(self).trouble()
            yield batch


def unreadable() -> None:
    raise UserError("these data are bad")


def dying() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stalling() -> None:
    """A batch queue tells all processes of its end meanwhile."""
    for process in (os.getpid(), int(os.environ["NEIGHBOUR"])):
        os.kill(process, signal.SIGTERM)
    time.sleep(60)


def train_troubled(output: Path, rank: int, trouble: Callable[[], None], elsewhere: bool = False) -> None:
    accelerator = make_accelerator(WIDE, output)
    os.environ["NEIGHBOUR"] = str(from_main(os.getpid(), accelerator))
    stage = ToyStage(WIDE)
    kind = type("Mine", (Troubled,), {"trouble": staticmethod(trouble)})
    stage.batches = kind(WIDE.global_batch, rank, accelerator.num_processes)
    own = output.with_name("elsewhere") if elsewhere and rank else output
    try:
        train(stage, WIDE, accelerator, own, WIDE)
        print(f"rank {rank}: ended\n", end="", flush=True)
    except UserError as error:
        print(f"rank {rank}: {error}\n", end="", flush=True)
        raise


def trouble(output: Path) -> None:
    for name, what, codes in (
        ("bad", unreadable, [1, 1]),
        ("dead", dying, [1, -signal.SIGKILL]),
        ("stalled", stalling, [0, 0]),
    ):
        print(name, flush=True)
        found = crew(2, lambda rank: train_troubled(output / name, rank, what))  # noqa: B023
        assert found == codes, (name, found)
    print("elsewhere", flush=True)
    assert crew(2, lambda rank: train_troubled(output / "stalled", rank, unreadable, True)) == [1, 1]
    print("held", flush=True)
    with held(output / "held"):
        assert crew(2, lambda rank: train_troubled(output / "held", rank, unreadable)) == [1, 1]


class Spread:
    """What accelerate's prepare does when its configuration says FSDP2, which it says on GPUs alone."""

    distributed_type = DistributedType.FSDP

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self.accelerator, name)

    def prepare(self, module: Any, optimizer: Any) -> tuple[Any, Any]:
        from torch.distributed.fsdp import fully_shard

        fully_shard(module)
        groups = {group["weight_decay"]: group for group in optimizer.param_groups}
        rest = {k: v for k, v in optimizer.param_groups[0].items() if k in ("lr", "betas", "fused")}
        wide = [p for p in module.parameters() if p.ndim >= 2], [p for p in module.parameters() if p.ndim < 2]
        assert set(groups) == {0.0}
        return module, torch.optim.AdamW([{"params": params, "weight_decay": 0.0} for params in wide], **rest)


def train_spread(output: Path, rank: int, steps: int, spread: bool) -> None:
    loop = replace(WIDE, steps=steps, save_every=4)
    config = replace(PLAIN, data=replace(PLAIN.data, workers=0, streams=4), loop=loop)
    accelerator: Any = make_accelerator(loop, output)
    stage = diffusion_stage(config, rank, accelerator.num_processes, CPU)
    train(stage, loop, Spread(accelerator) if spread else accelerator, output, config)


def train_on(output: Path, rank: int, shards: str) -> None:
    config = replace(PLAIN, data=replace(PLAIN.data, shards=shards, workers=0, streams=4), loop=WIDE)
    accelerator = make_accelerator(WIDE, output)
    try:
        train(diffusion_stage(config, rank, accelerator.num_processes, CPU), WIDE, accelerator, output, config)
    except UserError as error:
        print(f"rank {rank}: {error}\n", end="", flush=True)  # in one piece: both write at once
        raise


def main(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    output = Path(words[1])
    if words[0] == "kills":
        kills(output, int(words[2]))
    elif words[0] == "pair":
        pair(output, int(words[2]))
    elif words[0] == "trouble":
        trouble(output)
    elif words[0] == "elastic":
        for name, parts in (("whole", ((1, 8),)), ("fewer", ((2, 3), (1, 8))), ("more", ((1, 3), (2, 8)))):
            for world, steps in parts:
                assert crew(world, lambda rank: train_rows(output / name, rank, steps)) == [0] * world  # noqa: B023
    elif words[0] == "spread":
        for name, world, steps, spread in (
            ("plain", 2, 8, False),
            ("spread", 2, 8, True),
            ("parts", 2, 4, True),
            ("parts", 4, 8, True),
        ):
            assert crew(world, lambda rank: train_spread(output / name, rank, steps, spread)) == [0] * world  # noqa: B023
    elif words[0] == "strangers":
        shards = [f"{ICONS}/train-*.tar", f"{ICONS}/train-0000.tar"]
        assert crew(2, lambda rank: train_on(output / "run", rank, shards[rank])) == [1, 1]
    else:
        for world in (1, 2, 4):
            assert crew(world, lambda rank: train_rows(output / str(world), rank)) == [0] * world  # noqa: B023


if __name__ == "__main__":
    main(sys.argv[1:])
