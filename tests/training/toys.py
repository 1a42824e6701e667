"""Trainings of milliseconds: a toy stage for what the loop does, and small real stages on the fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import native
from ldm.config import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    AutoencoderTraining,
    DataConfig,
    DiffusionLossConfig,
    DiffusionTraining,
    LoopConfig,
    OptimizerConfig,
    UNetConfig,
)
from ldm.find import SHIPPED
from ldm.training.draws import Draws, generator
from ldm.training.loop import train
from ldm.training.processes import make_accelerator
from ldm.training.stage import Judge, Player

ICONS = Path(__file__).parents[1] / "fixtures" / "icons"
DATA = DataConfig(
    shards=f"{ICONS}/train-*.tar", validation=f"{ICONS}/val-*.tar", size=16, streams=4, shuffle=16, workers=0
)
LOOP = LoopConfig(steps=6, global_batch=8, ema=0.9, log_every=3, validate_every=100, save_every=3, threads=1)
CPU = torch.device("cpu")
SHIPPED_SIZE = native.read_config(SHIPPED["icons"]).image_size

AUTOENCODER = AutoencoderTraining(
    model=AutoencoderConfig(
        channels=32, multipliers=(1,), blocks=1, patch=2, middle_attention=False, latent_channels=3
    ),
    data=DATA,
    loss=AutoencoderLossConfig(
        perceptual=0.0,
        kl=1e-3,
        adversarial=0.5,
        adversarial_start=2,
        adversarial_ramp=0,
        discriminator_channels=32,
        discriminator_layers=1,
        discriminator_rate=1e-3,
    ),
    optimizer=OptimizerConfig(rate=1e-3),
    loop=LOOP,
    scale_samples=48,
)

PIXELS = DiffusionTraining(  # needs text=DIR, a tower of width 32
    model=UNetConfig(
        in_channels=3,
        out_channels=3,
        channels=32,
        multipliers=(1, 1),
        blocks=1,
        attention_levels=(1,),
        heads=2,
        context_width=32,
    ),
    data=replace(DATA, size=8),
    loss=DiffusionLossConfig(caption_dropout=0.3),
    optimizer=OptimizerConfig(rate=2e-3, warmup=5),
    loop=LOOP,
)


@dataclass(frozen=True)
class Rows:
    x: Tensor  # (B, 4)
    key: list[str]
    epoch: list[int]


class RowBatches:
    """Endless batches whose rows are a function of their number alone."""

    def __init__(self, size: int) -> None:
        self.size, self.drawn = size, 0
        self.quarantined: set[str] = set()
        self.events: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Rows]:
        while True:
            numbers = range(self.drawn * self.size, (self.drawn + 1) * self.size)
            self.drawn += 1
            x = torch.stack([torch.randn(4, generator=generator("row", n)) for n in numbers])
            yield Rows(x, [f"row{n}" for n in numbers], [0] * self.size)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]

    def describe(self) -> str:
        return "rows"


class ToyStage:
    """Regression on noisy rows. `before` is called with each step's number; a factor it returns spoils the loss."""

    judge: Judge | None = None

    def __init__(
        self,
        loop: LoopConfig = LOOP,
        before: Callable[[int], float | None] = lambda step: None,
        dropout: float = 0.0,
        width: int = 8,
        critic: bool = False,
        deeper: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        more = [nn.Linear(1, 1)] if deeper else []
        network = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 1), *more)
        network = network.to(dtype)
        self.network, self.dtype, self.before = network, dtype, before
        optimizer = OptimizerConfig(rate=1e-2, clip=1.0)
        self.players = {"net": Player(network, optimizer)}
        if critic:
            self.players["critic"] = Player(nn.Linear(4, 1).to(dtype), replace(optimizer, rate=2e-2), averaged=False)
        self.batches = RowBatches(loop.global_batch)
        self.seen: list[tuple[str, int, bool, Tensor]] = []  # (what was called, step, training mode, first weights)

    def describe(self) -> list[str]:
        return ["toy         rows"]

    def losses(
        self, batch: Rows, draws: Draws, step: int, networks: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        factor = self.before(step)
        x = (batch.x + 0.3 * draws.normal("noise", (4,))).to(self.dtype)
        loss = (networks["net"](x) - batch.x.sum(1, keepdim=True)).square().mean()
        loss = loss if factor is None else loss * factor
        odd = {"odd": torch.tensor(float(step))} if step % 2 else {}
        yield "net", loss, {"loss": loss, **odd}
        if "critic" in self.players:
            yield "critic", (networks["critic"](x) - 1).square().mean(), {}

    def validate(self) -> dict[str, float]:
        self._note("validate", -1)
        return {"validation/weight": float(self.network[0].weight.detach().sum())}

    def draw(self, output: Path, step: int) -> None:
        self._note("draw", step)

    def export(self, output: Path, finished: bool) -> None:
        self._note("export", -1)

    def _note(self, what: str, step: int) -> None:
        self.seen.append((what, step, self.network.training, self.network[0].weight.detach().clone()))

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for player in self.players.values() for p in player.module.parameters()]


def run(stage: Any, loop: LoopConfig, output: Path, everything: Any = None) -> None:
    """Train `stage` as a script does."""
    train(stage, loop, make_accelerator(loop, output), output, loop if everything is None else everything)


def log_of(output: Path) -> list[dict[str, Any]]:
    """The lines of the log, without what the clock says."""
    import json

    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "waiting")} for line in lines]
