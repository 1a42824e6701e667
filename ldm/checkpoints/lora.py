"""LoRA files and their kin, read in everybody's names (lora_names.py) and written in diffusers' or kohya's.

    LoRA, LoCon   .lora_down.weight  .lora_up.weight   or .lora_A.weight  .lora_B.weight; with a core .lora_mid.weight
    LoHa          .hada_w1_a  .hada_w1_b  .hada_w2_a  .hada_w2_b; with cores .hada_t1  .hada_t2
    LoKr          .lokr_w1 or .lokr_w1_a  .lokr_w1_b;  .lokr_w2 or .lokr_w2_a  .lokr_w2_b, with a core .lokr_t2
    full          .diff  .diff_b  .w_norm  .b_norm
    DoRA          .dora_scale or .lora_magnitude_vector beside any of these
    strength      .alpha

Where nothing says alpha, it is the rank. Other kinds are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.adapters.changes import (
    Change,
    Difference,
    Factors,
    Hadamard,
    HalvesSwapped,
    Kronecker,
    Magnitude,
    Product,
    Turned,
)
from ldm.adapters.lora import Lora, Rows
from ldm.checkpoints import lora_names
from ldm.checkpoints.peft_settings import Strength
from ldm.checkpoints.reading import Tensors, read_tensors
from ldm.checkpoints.state import some
from ldm.checkpoints.textual_inversion import BUNDLED
from ldm.checkpoints.writing import write_tensors
from ldm.errors import UserError
from ldm.files import atomic_write
from ldm.networks import AnyNetwork
from ldm.unet.unet import UNet

LAYOUTS = ("diffusers", "kohya")
KOHYA = {"unet": "lora_unet_", "text": "lora_te_text_model_", "text_2": "lora_te2_text_model_"}
DIFFUSERS = {"unet": "unet.", "text": "text_encoder.text_model.", "text_2": "text_encoder_2.text_model."}

Towers = nn.Module | Mapping[str, nn.Module] | None
"""The text towers by the names of their parts ("text", "text_2"); one alone is the first."""


def read_lora(path: str | Path, unet: AnyNetwork, text: Towers) -> Lora:
    """The changes that the file at `path` makes to these networks.

    Raises UserError if it is no LoRA file, has tensors that fit nothing in them, or misses half of a change. (Shapes
    are compared when it is merged.)
    """
    path = Path(path)
    tensors = read_tensors(path)
    tables = lora_names.make_tables(unet, _by_part(text))
    found: dict[tuple[str, str], _Said] = {}
    strangers = []
    for name in tensors:
        if BUNDLED.fullmatch(name):
            continue
        parsed = lora_names.split(name)
        place = lora_names.place(parsed[0], tables) if parsed is not None else None
        if parsed is None or place is None:
            strangers.append(name)
            continue
        said = found.setdefault(place, _Said(path, tensors, place[0], parsed[0]))
        if parsed[1] in said.sides:
            raise said.error("is said twice; one of the two has to go")
        said.sides[parsed[1]] = name
    if strangers or not found:
        kind = lora_names.stranger(strangers)
        if kind:
            raise UserError(f"{path} is {kind}")
        if not found:
            raise UserError(f"{path} has no LoRA for this model: its tensors are {some(strangers or list(tensors))}")
        raise UserError(f"{path} has {len(strangers)} tensors that fit nothing in this model ({some(strangers)})")
    strength, swapped = Strength(path, tensors), lora_names.swapped_modules(unet)
    changes: dict[str, dict[Rows, Change]] = {}
    for (part, key), said in found.items():
        for leaf, change in _changes(said, strength).items():
            if leaf not in tables[part][key]:
                raise said.error(f"is of a {leaf}, which this model does not have there")
            rows = tables[part][key][leaf]
            change = HalvesSwapped(change) if part == "unet" and key in swapped else change
            changes.setdefault(part, {})[rows] = Turned(change) if rows.name == lora_names.PROJECTION else change
    return Lora(changes, str(path))


def _by_part(text: Towers) -> Mapping[str, nn.Module]:
    if isinstance(text, nn.Module):
        return {"text": text}
    return text or {}


# ---------------------------------------------------------------- one module


@dataclass
class _Said:
    """What a file says of one module: "down", "up", ... -> the tensor's name."""

    path: Path
    tensors: Tensors
    part: str
    module: str
    sides: dict[str, str] = field(default_factory=dict)

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path}: the change of {self.module[:100]} {what}")

    def take(self, side: str) -> Tensor:
        """The floats of that name, which are used up. Raises UserError if the file does not have them."""
        if side not in self.sides:
            raise self.error(f"has no {side}, so that half of it is missing; copy the file again")
        value = self.tensors[self.sides.pop(side)]
        if not value.is_floating_point():
            raise self.error(f"holds {side} as {str(value.dtype).removeprefix('torch.')}, not as floats")
        if not value.numel():
            raise self.error(f"holds nothing as {side}")
        return value

    def matrix(self, side: str, kernel: bool = False) -> Tensor:
        """(m, n), or a convolution's weight that is one, (m, n, 1, 1); with `kernel` of any size, (m, n, kh, kw)."""
        value = self.take(side)
        if value.ndim < 2 or (not kernel and math.prod(value.shape[2:]) != 1):
            raise self.error(f"holds {side} as {tuple(value.shape)}, which is no matrix")
        return value

    def core(self, side: str) -> Tensor | None:
        """(r, q, kh, kw), if the file has one."""
        if side not in self.sides:
            return None
        value = self.take(side)
        if value.ndim != 4:
            raise self.error(f"holds {side} as {tuple(value.shape)}, which is no core of a convolution")
        return value


def _changes(said: _Said, strength: Strength) -> dict[str, Change]:
    """ "weight" and "bias" -> how they change."""
    made: dict[str, Change] = {}
    if "diff_b" in said.sides:
        made["bias"] = Difference(said.take("diff_b"))
    lengths = {side: said.take(side) for side in ("dora_scale", "magnitude") if side in said.sides}
    if said.sides or lengths or not made:
        change = _weight_change(said, strength)
        for side, value in lengths.items():
            # LyCORIS and OneTrainer keep the axis they mean: (out, 1) or (1, in). peft's are the outputs always.
            inputs = side == "dora_scale" and value.ndim > 1 and value.shape[0] == 1 and value.shape[1] > 1
            change = Magnitude(change, value, int(inputs))
        made["weight"] = change
    if said.sides or len(lengths) > 1:
        raise said.error(f"is said twice: {', '.join([*said.sides, *lengths])} beside another; one has to go")
    return made


def _weight_change(said: _Said, strength: Strength) -> Change:
    alpha = _alpha(said)
    name = lora_names.strip(said.module)

    def alpha_of(rank: int) -> float:
        return strength.alpha(said.part, name, rank) if alpha is None else alpha

    if any(side.startswith("hada_") for side in said.sides):
        first, second = (_product(said, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
        return Hadamard(first, second, alpha_of(first.rank) / first.rank)
    if any(side.startswith("lokr_") for side in said.sides):
        first, second = (_kronecker_factor(said, i) for i in (1, 2))
        rank = (second if second.right is not None else first).rank
        if first.right is second.right is None:  # of two whole matrices peft alone says how strong they are
            rank = (strength.rank(said.part, name) if alpha is None else None) or 0
        return Kronecker(first, second, alpha_of(rank) / rank if rank else 1.0)
    if "diff" in said.sides:
        return Difference(said.take("diff"))
    up, core, down = said.matrix("up"), said.core("mid"), said.matrix("down", kernel=True)
    return Factors(down, up, alpha_of(len(down)), core)


def _alpha(said: _Said) -> float | None:
    """What the file's tensors say of it."""
    if "alpha" not in said.sides:
        return None
    value = said.tensors[said.sides.pop("alpha")]
    if value.numel() != 1:
        raise said.error(f"has {value.numel()} numbers as alpha; it is one")
    return float(value)


def _kronecker_factor(said: _Said, i: int) -> Product:
    if f"lokr_w{i}" in said.sides:
        return Product(said.matrix(f"lokr_w{i}", kernel=True).flatten(1))
    return _product(said, f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}")


def _product(said: _Said, left: str, right: str, core: str) -> Product:
    """left @ right; where there is a core, left is kept as (r, out)."""
    middle = said.core(core)
    first, second = said.matrix(left).flatten(1), said.matrix(right).flatten(1)
    return Product(first if middle is None else first.T, second, middle)


# ---------------------------------------------------------------- writing


def save_lora(
    path: str | Path,
    lora: Lora,
    unet: AnyNetwork,
    text: Towers,
    layout: str = "diffusers",
    words: Mapping[str, str] | None = None,
) -> None:
    """Write `lora`, of low-rank changes made for these networks, as a .safetensors file that others read.

    In diffusers' names alpha is multiplied into the up matrix (its loaders take the rank for alpha). `words` go into
    the file's metadata (adapter_words.py), beside rank and alpha. Raises UserError if the disk does not take it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"the layouts are {LAYOUTS}, not {layout!r}")
    towers, of_unet = _by_part(text), lora_names.unet_names(unet)
    if layout == "kohya" and not isinstance(unet, UNet):  # its trainer of these has the original's modules
        of_unet = lora_names.original_names(unet)
    names = {"unet": of_unet} | {part: lora_names.text_names(own) for part, own in towers.items()}
    swapped = lora_names.swapped_modules(unet)
    kohya = KOHYA | ({"text": "lora_te1_text_model_"} if len(towers) > 1 else {})
    tensors: dict[str, Tensor] = {}
    ranks, alphas = set(), set()
    for part, changes in lora.changes.items():
        for rows, factors in _pieces(changes, names[part]):
            if not isinstance(factors, Factors) or factors.core is not None:
                raise ValueError(f"the change of {rows.name} is not of low rank, and others are not written")
            module = names[part][rows].removesuffix(".weight")
            down, up = factors.down.detach().cpu(), factors.up.detach().cpu()
            if part == "unet" and module.replace(".", "_") in swapped:
                up = torch.cat(up.chunk(2)[::-1])
            ranks.add(factors.rank)
            alphas.add(factors.alpha)
            if layout == "kohya":
                flat = (kohya[part] + module).replace(".", "_")
                tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"] = down, up
                tensors[f"{flat}.alpha"] = torch.tensor(float(factors.alpha))
            else:
                whole = (DIFFUSERS[part] if part != "unet" or isinstance(unet, UNet) else "transformer.") + module
                tensors[f"{whole}.lora_A.weight"] = down
                tensors[f"{whole}.lora_B.weight"] = up * (factors.alpha / factors.rank)
    said = {"ss_network_dim": _one(ranks), "ss_network_alpha": _one(alphas)}
    metadata = {"format": "pt", "ss_network_module": "networks.lora", **said, **(words or {})}
    with atomic_write(path) as temporary:
        write_tensors({name: value.clone() for name, value in tensors.items()}, temporary, metadata)


def _pieces(changes: Mapping[Rows, Change], names: Mapping[Rows, str]) -> Iterator[tuple[Rows, Change]]:
    """The changes, a low-rank one of queries, keys and values together cut where `names` have them apart."""
    for rows, change in changes.items():
        count = max((other.pieces for other in names if other.name == rows.name), default=rows.pieces)
        if rows in names or not isinstance(change, Factors) or rows.pieces != 1:
            yield rows, change
            continue
        alpha = change.alpha
        for piece, up in enumerate(change.up.chunk(count)):
            yield Rows(rows.name, piece, count), Factors(change.down, up, alpha)


def _one(values: Collection[float]) -> str:
    """The value that all have, or kohya's word for several."""
    return f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"
