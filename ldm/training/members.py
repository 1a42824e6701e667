"""Who takes part in a run: networks, their optimizers and averages, and the precision's loss scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ldm.backends.heap import keep_memory
from ldm.backends.trained import trained
from ldm.config import LoopConfig
from ldm.errors import UserError
from ldm.training.ema import EMA, local, power
from ldm.training.optim import build_optimizer, rate_at
from ldm.training.posthoc import save_snapshot
from ldm.training.sharding import is_sharded, mesh_of, whole
from ldm.training.stage import Player


class Members:
    """The players of a stage on `accelerator`, ready to be trained."""

    def __init__(self, players: Mapping[str, Player], loop: LoopConfig, accelerator: Accelerator) -> None:
        self.players, self.steps = players, loop.steps
        self.scaler = accelerator.scaler  # of fp16's loss, None in other precisions
        self.networks: dict[str, nn.Module] = {}  # as they are called in a step, which exchanges gradients
        self.optimizers: dict[str, Any] = {}  # accelerate's wrappers
        for name, player in players.items():
            player.module.to(accelerator.device)
            if accelerator.distributed_type == DistributedType.FSDP:  # which takes no other order in memory
                player.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            elif accelerator.device.type == "cpu":
                keep_memory()
                trained(player.module)
            optimizer = build_optimizer(player.module, player.optimizer)
            if loop.compile:  # for each size by itself: what is made for any size is slower, and fails on some networks
                player.module.compile(dynamic=False)
            self.networks[name], self.optimizers[name] = accelerator.prepare(player.module, optimizer)
        self.sharded = any(is_sharded(player.module) for player in players.values())
        if self.sharded and (loop.ema_on_cpu or loop.ema_widths):
            raise UserError(
                "loop.ema_on_cpu and loop.ema_widths do not go with parameters spread by FSDP; leave them out"
            )
        self.main = accelerator.is_main_process
        averaged = {name: player.module for name, player in players.items() if player.averaged}
        cpu = loop.ema_on_cpu
        self.averages = {name: EMA(module, loop.ema, cpu) for name, module in averaged.items() if loop.ema}
        for name, average in self.averages.items():
            players[name].average = None if cpu or self.sharded else average.asked
        self.profiles = {
            (name, width): EMA(module, power(width), cpu)
            for name, module in averaged.items()
            for width in loop.ema_widths
        }

    def clip(self, played: Sequence[str]) -> dict[str, float]:
        """Gradient norms, before they are cut to what each optimizer's settings allow.

        What accelerate does to clip and to step updates the scale after each optimizer; with two of them, as in a GAN,
        the second would meet a scale that is not its gradients'. Hence the scaler is used here and in `update` alone.
        """
        norms = {}
        for name in played:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizers[name].optimizer)
            most = self.players[name].optimizer.clip or math.inf
            norm = nn.utils.clip_grad_norm_(self.networks[name].parameters(), most)
            norms[name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return norms

    def update(self, played: Sequence[str], step: int) -> None:
        """One step of the optimizers and averages of those who played; their gradients must be finite."""
        for name in played:
            for group in self.optimizers[name].param_groups:
                group["lr"] = self.rate(name, step)
            if self.scaler is not None:
                self.scaler.step(self.optimizers[name].optimizer)
            else:
                self.optimizers[name].step()
            for average in self._averages_of(name):
                average.update()

    def forget(self, played: Sequence[str]) -> None:
        """Drop the gradients, used or not."""
        if self.scaler is not None:
            self.scaler.update()
        for name in played:
            self.optimizers[name].zero_grad()

    def rate(self, name: str, step: int) -> float:
        return rate_at(self.players[name].optimizer, step, self.steps)

    def not_finite(self) -> str:
        """The name of something that has a value which is not finite: a network, or its average; else empty."""
        for name, player in self.players.items():
            tensors = [local(t) for t in player.module.state_dict().values() if t.is_floating_point()]
            for average in self._averages_of(name):
                tensors += [local(tensor) for tensor in average.average.values()]
            for device in {tensor.device for tensor in tensors}:  # the largest value of each; NaN is passed on
                here = [tensor for tensor in tensors if tensor.device == device and tensor.numel()]
                norms = torch._foreach_norm(here, math.inf)  # pyright: ignore[reportPrivateImportUsage]
                if not bool(torch.stack([norm.float() for norm in norms]).isfinite().all()):
                    return name
        return ""

    def snapshot(self, output: Path, step: int) -> None:
        """Keep the power-function averages for later; raises UserError if the disk does not take them."""
        for (name, width), profile in self.profiles.items():
            save_snapshot(output, name, width, step, profile.updates, profile.average)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Averaged weights in place, evaluation mode on; both undone at the end.

        Where parameters are spread over processes every one must enter, and the main one then has them whole.
        """
        with ExitStack() as stack:
            for average in self.averages.values():
                stack.enter_context(average.applied())
            for player in self.players.values():
                player.module.eval()
                if self.sharded:
                    stack.enter_context(whole(player.module, self.main))
            try:
                yield
            finally:
                for player in self.players.values():
                    player.module.train()

    def state_dict(self) -> dict[str, Any]:
        return {
            "modules": {name: player.module.state_dict() for name, player in self.players.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "profiles": {f"{name} {width}": profile.state_dict() for (name, width), profile in self.profiles.items()},
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, naming what differs, or RuntimeError for the state of other networks."""
        for name, player in self.players.items():
            player.module.load_state_dict(_of(state, "modules", name))
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        for name, average in self.averages.items():
            average.load_state_dict(_of(state, "averages", name, "loop.ema"))
        for (name, width), profile in self.profiles.items():
            profile.load_state_dict(_of(state, "profiles", f"{name} {width}", "loop.ema_widths"))
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def mesh(self) -> DeviceMesh:
        """The processes among which parameters are spread."""
        mesh = next((mesh for player in self.players.values() if (mesh := mesh_of(player.module))), None)
        assert mesh is not None
        return mesh

    def _averages_of(self, name: str) -> list[EMA]:
        profiles = [profile for (player, _), profile in self.profiles.items() if player == name]
        return [*([self.averages[name]] if name in self.averages else []), *profiles]


def _of(state: Mapping[str, Any], kind: str, name: str, setting: str = "") -> Any:
    """A network, or an average, in a state; raises ValueError if it was made without."""
    if name not in state[kind]:
        raise ValueError(f"it has no average {name}, for {setting} was another one" if setting else f"it has no {name}")
    return state[kind][name]
