"""LoRA files, in the names of kohya's scripts and of diffusers and peft, both ways.

    kohya       lora_unet_down_blocks_0_..._to_q.lora_down.weight    .lora_up.weight    .alpha    (lora_te_: text tower)
    diffusers   unet.down_blocks.0....to_q.lora_A.weight             .lora_B.weight               (text_encoder.)
                older: .lora.down.weight   .lora_linear_layer.down.weight   attn1.processor.to_q_lora.down.weight

Kohya's names are diffusers' names of modules with the dots gone, or the original checkpoint's; a name without a prefix
is the U-Net's. Where a file says no alpha, it is the rank. Other decompositions (LoHa, LoKr, DoRA) are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.adapters.lora import Factors, Lora, Rows
from ldm.checkpoints import diffusers, original
from ldm.checkpoints.common_names import clip_names
from ldm.checkpoints.reading import Tensors, read_tensors
from ldm.checkpoints.state import some
from ldm.errors import UserError
from ldm.files import atomic_write
from ldm.plain import parse_json, read_json
from ldm.unet.unet import UNet

LAYOUTS = ("diffusers", "kohya")
KOHYA = {"unet": "lora_unet_", "text": "lora_te_"}
DIFFUSERS = {"unet": "unet.", "text": "text_encoder.text_model."}
PREFIXES = {
    "unet.": "unet",
    "text_encoder.": "text",
    "lora_unet_": "unet",
    "lora_te_": "text",
    "lora_te1_": "text",
    "": "unet",
}

_TENSOR = re.compile(r"(.+?)\.(?:(alpha)|lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight)")
_SIDES = {"down": "down", "A": "down", "up": "up", "B": "up"}
_OLD = ((r"\.processor\.to_([qkv])_lora\.", r".to_\1.lora."), (r"\.processor\.to_out_lora\.", ".to_out.0.lora."))


def read_lora(path: str | Path, unet: UNet, text: nn.Module | None) -> Lora:
    """The changes that the file at `path` makes to these networks.

    Raises UserError if it is no LoRA file, has tensors that fit nothing in them, or misses half of a change. (Shapes
    are compared when it is merged.)
    """
    path = Path(path)
    tensors = read_tensors(path)
    tables = {"unet": _unet_table(unet)} | ({"text": _text_table(text)} if text is not None else {})
    found: dict[tuple[str, Rows], dict[str, str]] = {}
    strangers = []
    modules: dict[tuple[str, Rows], str] = {}
    for name in tensors:
        parsed = _TENSOR.fullmatch(_modern(name))
        place = _place(parsed[1], tables) if parsed is not None else None
        if parsed is None or place is None:
            strangers.append(name)
        else:
            side = parsed[2] or _SIDES[parsed[3]]
            if side in found.setdefault(place, {}):
                raise UserError(f"{path} says twice what the change of {parsed[1][:100]} is; one of them has to go")
            found[place][side] = name
            modules[place] = parsed[1]
    if strangers and len(strangers) == len(tensors):
        raise UserError(f"{path} has no LoRA for this model: its tensors are {some(strangers)}")
    if strangers:
        raise UserError(f"{path} has {len(strangers)} tensors that fit nothing in this model ({some(strangers)})")
    alpha_of = _alphas(path, tensors)
    changes: dict[str, dict[Rows, Factors]] = {part: {} for part in tables}
    for (part, rows), names in found.items():
        if not {"up", "down"} <= set(names):
            raise UserError(f"{path} has half of the change of {modules[part, rows][:100]}; copy it again")
        down, up = _float(tensors, names["down"], path), _float(tensors, names["up"], path)
        if down.ndim < 2 or up.ndim < 2 or not down.numel() or math.prod(up.shape[2:]) != 1:
            raise UserError(f"{path}: the change of {modules[part, rows][:100]} is not of two matrices")
        alpha = float(tensors[names["alpha"]]) if "alpha" in names and tensors[names["alpha"]].numel() == 1 else None
        changes[part][rows] = Factors(down, up, alpha_of(modules[part, rows], len(down)) if alpha is None else alpha)
    return Lora({part: each for part, each in changes.items() if each}, str(path))


def save_lora(path: str | Path, lora: Lora, unet: UNet, text: nn.Module | None, layout: str = "diffusers") -> None:
    """Write `lora`, made for these networks, as a .safetensors file that others read.

    In diffusers' names alpha is multiplied into the up matrix (its loaders take the rank for alpha). Raises UserError
    if the disk does not take it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"the layouts are {LAYOUTS}, not {layout!r}")
    names = {"unet": _diffusers_names(unet)} | ({"text": _text_names(text)} if text is not None else {})
    tensors: dict[str, Tensor] = {}
    for part, changes in lora.changes.items():
        for rows, factors in changes.items():
            module, down, up = names[part][rows], factors.down.detach().cpu(), factors.up.detach().cpu()
            if layout == "kohya":
                flat = (KOHYA[part] + ("text_model." if part == "text" else "") + module).replace(".", "_")
                tensors[f"{flat}.lora_down.weight"], tensors[f"{flat}.lora_up.weight"] = down, up
                tensors[f"{flat}.alpha"] = torch.tensor(float(factors.alpha))
            else:
                whole = DIFFUSERS[part] + module
                tensors[f"{whole}.lora_A.weight"] = down
                tensors[f"{whole}.lora_B.weight"] = up * (factors.alpha / factors.rank)
    with atomic_write(path) as temporary:
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, temporary, {"format": "pt"})


# ---------------------------------------------------------------- names


def _diffusers_names(unet: UNet) -> dict[Rows, str]:
    """Each weight that a LoRA may change -> the module's name in diffusers."""
    names = diffusers.unet_names(_matrices(unet))
    return {Rows(ours): theirs.removesuffix(".weight") for ours, (theirs,) in names.items()}


def _text_names(text: nn.Module) -> dict[Rows, str]:
    """The same of the text tower, in Hugging Face's names without the prefix "text_model."."""
    keys = [key for key in _matrices(text) if key.startswith("transformer.")]
    names: dict[Rows, str] = {}
    for ours, theirs in clip_names(keys, "").items():
        for piece, name in enumerate(theirs):
            names[Rows(ours, piece, len(theirs))] = name.removesuffix(".weight")
    return names


def _unet_table(unet: UNet) -> dict[str, Rows]:
    """Diffusers' and the original names of modules, dots gone -> what they are here."""
    table = {name.replace(".", "_"): rows for rows, name in _diffusers_names(unet).items()}
    for ours, (theirs,) in original.unet_names(_matrices(unet), unet.config).items():
        module = theirs.removeprefix(original.UNET).removesuffix(".weight")
        table.setdefault(module.replace(".", "_"), Rows(ours))
    return table


def _text_table(text: nn.Module) -> dict[str, Rows]:
    return {name.replace(".", "_"): rows for rows, name in _text_names(text).items()}


def _matrices(network: nn.Module) -> list[str]:
    """The weights of linear layers and convolutions, and the three in one of an attention of torch's own."""
    names = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            names.append(f"{name}.weight")
        elif isinstance(module, nn.MultiheadAttention):
            names.append(f"{name}.in_proj_weight")
    return names


def _modern(name: str) -> str:
    for pattern, replacement in _OLD:
        name = re.sub(pattern, replacement, name)
    return name.removeprefix("base_model.model.")


def _place(module: str, tables: Mapping[str, Mapping[str, Rows]]) -> tuple[str, Rows] | None:
    """The network's name and the weight that `module`, as a file names it, is; None if there is none."""
    prefix = next(prefix for prefix in PREFIXES if module.startswith(prefix))
    part = PREFIXES[prefix]
    flat = module.removeprefix(prefix).replace(".", "_")
    if part == "text":
        flat = flat.removeprefix("text_model_")
    rows = tables.get(part, {}).get(flat)
    return None if rows is None else (part, rows)


# ---------------------------------------------------------------- alpha


def _alphas(path: Path, tensors: Tensors) -> Any:
    """(module, rank) -> alpha, for files whose tensors do not say it: peft's settings, in the metadata or beside."""
    settings: dict[str, Any] = {}
    if "lora_adapter_metadata" in tensors.metadata:
        settings = parse_json(tensors.metadata["lora_adapter_metadata"], path)
    elif any(name.startswith("base_model.model.") for name in tensors):
        beside = path.parent / "adapter_config.json"
        settings = read_json(beside) if beside.is_file() else {}

    def alpha_of(module: str, rank: int) -> float:
        prefix = next((p for p in ("unet.", "text_encoder.") if f"{p}lora_alpha" in settings), "")
        if module.startswith(("unet.", "text_encoder.")) and prefix:
            prefix = module[: module.index(".") + 1]
        patterns = settings.get(f"{prefix}alpha_pattern")
        alpha: Any = settings.get(f"{prefix}lora_alpha", rank)
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if module == pattern or module.endswith(f".{pattern}"):
                alpha = value
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise UserError(f"{path} says that alpha is {str(alpha)[:40]}, which is no number")
        return alpha * math.sqrt(rank) if settings.get(f"{prefix}use_rslora") is True else float(alpha)

    return alpha_of


def _float(tensors: Tensors, name: str, path: Path) -> Tensor:
    value = tensors[name]
    if not value.is_floating_point():
        raise UserError(f"{path} holds {name[:100]} as {str(value.dtype).removeprefix('torch.')}, not as floats")
    return value
