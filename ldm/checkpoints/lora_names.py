"""The names that LoRA files give to a model's modules, and to what they say of them.

    kohya       lora_unet_down_blocks_0_..._to_q              lora_te_text_model_encoder_layers_0_...
    diffusers   unet.down_blocks.0....to_q                    text_encoder.text_model.encoder.layers.0....
    ComfyUI     diffusion_model.input_blocks.1.1....to_q      text_encoders.clip_l.transformer.text_model....
    OneTrainer  unet.input_blocks.1.1....to_q                 clip_l.text_model....      (and kohya's)
    SD 3        lora_unet_joint_blocks_0_x_block_attn_qkv      transformer.transformer_blocks.0.attn.to_q
    peft        base_model.model.down_blocks.0....to_q        LyCORIS  lycoris_down_blocks_0_..._to_q

Behind the prefix stands diffusers' name of a module or the original checkpoint's, with dots or without.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from torch import nn

from ldm.adapters.lora import Rows
from ldm.checkpoints import diffusers, mmdit, original
from ldm.checkpoints.common_names import clip_names
from ldm.networks import AnyNetwork
from ldm.unet.unet import UNet

PROJECTION = "text_projection"
"""Of a text tower: the one matrix that is x W here and x W^T, a linear layer's, in Hugging Face's names."""

Table: TypeAlias = dict[str, dict[str, Rows]]
"""A module's foreign name, its dots gone -> "weight" and "bias" -> what they are here."""

PREFIXES: dict[str, tuple[str, ...]] = {  # the first that fits -> the networks whose modules may follow
    "lora_unet_": ("unet",),
    "lora_te_": ("text",),
    "lora_te1_": ("text",),
    "lora_te2_": ("text_2",),
    "lycoris_": ("unet", "text"),
    "unet.": ("unet",),
    "transformer.": ("unet",),
    "lora_transformer_": ("unet",),
    "diffusion_model.": ("unet",),
    "model.diffusion_model.": ("unet",),
    "text_encoder.": ("text",),
    "text_encoder_2.": ("text_2",),
    "text_encoders.clip_l.": ("text",),
    "text_encoders.clip_h.": ("text",),
    "text_encoders.clip_g.": ("text_2",),
    "clip_l.": ("text",),
    "clip_h.": ("text",),
    "clip_g.": ("text_2",),
    "": ("unet", "text"),
}

STRANGERS = (  # part of a name -> the kind of file, said by name: these are what people have lying about
    (r"\.(oft|boft)_", "an OFT"),
    (r"\.on_input$", "an IA3"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.lokr_t1$", "a LoKr with two cores"),
    (r"\.(lora_up|lora_B)(\.default)?\.bias$", "a LoRA with biases of its own (peft's lora_bias)"),
    (r"\.lora_embedding_[AB]$", "a LoRA of an embedding table"),
    (r"\.(set_weight|reshape_weight)$", "a file of whole weights"),
    (r"^lora_te3_|^text_encoder_3\.|\bt5xxl\.", "a LoRA of T5"),
)
OTHERS = (  # read, but not for this model
    (r"^lora_te2_|^text_encoder_2\.|\bclip_g\.", "a LoRA of Stable Diffusion XL"),
    (r"^lora_transformer_|^transformer\.|(double|single|joint)_blocks", "a LoRA of a transformer (SD 3, Flux)"),
)

_OLD = (  # diffusers until 0.17, and its text encoder's until 0.19
    (r"\.processor\.", "."),
    (r"(\.self_attn)\.to_([qkv])(?=_lora\.|\.lora)", r"\1.\2_proj"),
    (r"(\.self_attn)\.to_out(?=_lora\.|\.lora)", r"\1.out_proj"),
    (r"\.to_out(?=_lora\.|\.lora)", ".to_out.0"),
    (r"(?<=[\w])_lora\.(?=(down|up)\.)", ".lora."),
)
_SAID = re.compile(
    r"(.+?)\.(?:(alpha|dora_scale|diff|diff_b|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)|([wb])_norm"
    r"|lora(?:_linear_layer)?[._](down|up|mid|A|B)(?:\.default)?\.weight"
    r"|lora_(magnitude)_vector(?:\.default)?(?:\.weight)?)"
)
_SIDES = {"A": "down", "B": "up", "w": "diff", "b": "diff_b"}


def split(name: str) -> tuple[str, str] | None:
    """A tensor's name -> the module's and what is said of it: "down", "up", "mid", "alpha", "hada_w1_a", ..., "diff"
    (of a weight), "diff_b" (of a bias), "dora_scale" (LyCORIS') or "magnitude" (peft's). None: none of these."""
    for pattern, replacement in _OLD:
        name = re.sub(pattern, replacement, name)
    parsed = _SAID.fullmatch(name)
    if parsed is None:
        return None
    module, *sides = parsed.groups()
    side = next(side for side in sides if side)
    return module, _SIDES.get(side, side)


def strip(module: str) -> str:
    """A module's name without what stands before the network's own names."""
    return _strip(module)[1]


def _strip(module: str) -> tuple[str, str]:
    module = module.removeprefix("base_model.model.")
    prefix = next(prefix for prefix in PREFIXES if module.startswith(prefix))
    return prefix, module.removeprefix(prefix).removeprefix("base_model.model.")


def place(module: str, tables: Mapping[str, Table]) -> tuple[str, str] | None:
    """The network ("unet", "text", "text_2") and the key in its table of `module`, as a file names it; None if it has
    none."""
    prefix, name = _strip(module)
    flat = name.replace(".", "_")
    for part in PREFIXES[prefix]:
        key = re.sub(r"^(transformer_)?text_model_", "", flat) if part != "unet" else flat
        if key in tables.get(part, {}):
            return part, key
    return None


def stranger(names: Iterable[str]) -> str:
    """What a file with these tensors is, and why it is not merged here, if its kind is known; "" otherwise."""
    names = list(names)
    for kinds, why in (
        (STRANGERS, "is not supported here (LoRA, LoHa, LoKr, DoRA and differences are)"),
        (OTHERS, "is not supported by a model of another kind; take one that was made for this model"),
    ):
        for name in names:
            for pattern, kind in kinds:
                if re.search(pattern, name):
                    return f"{kind}, which {why}"
    return ""


def make_tables(unet: AnyNetwork, towers: Mapping[str, nn.Module]) -> dict[str, Table]:
    """All modules of the networks in all foreign names; `towers` are the text towers by the names of their parts."""
    table = _table(unet_names(unet))
    for rows, theirs in original_names(unet).items():
        _enter(table, theirs, rows)
    found = {"unet": table}
    for part, tower in towers.items():
        found[part] = _table(text_names(tower))
        if getattr(tower, PROJECTION, None) is not None:
            found[part][PROJECTION] = {"weight": Rows(PROJECTION)}
    return found


def unet_names(unet: AnyNetwork) -> dict[Rows, str]:
    """Each weight and bias -> its name in diffusers."""
    keys = _parameters(unet)
    if isinstance(unet, UNet):
        return _paired(diffusers.unet_names(keys))
    return _paired(mmdit.diffusers_names(keys))


def swapped_modules(unet: AnyNetwork) -> set[str]:
    """Those of diffusers' modules, their dots gone, whose rows stand in another order there (checkpoints/mmdit.py)."""
    if isinstance(unet, UNet):
        return set()
    return {name.rpartition(".")[0].replace(".", "_") for name in mmdit.swapped_names(unet_names(unet).values())}


def original_names(unet: AnyNetwork) -> dict[Rows, str]:
    """Each weight and bias -> its name in the original checkpoint."""
    keys = _parameters(unet)
    if not isinstance(unet, UNet):
        return _paired(mmdit.original_names(keys))
    names = _paired(original.unet_names(keys, unet.config))
    return {rows: theirs.removeprefix(original.UNET) for rows, theirs in names.items()}


def text_names(text: nn.Module) -> dict[Rows, str]:
    """The same of the text tower, in Hugging Face's names without the prefix "text_model."."""
    keys = [key for key in _parameters(text) if key.startswith(("transformer.", "ln_final."))]
    return _paired(clip_names(keys, ""))


def _parameters(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_parameters() if name.endswith(("weight", "bias"))]


def _paired(names: Mapping[str, tuple[str, ...]]) -> dict[Rows, str]:
    return {Rows(ours, i, len(theirs)): name for ours, theirs in names.items() for i, name in enumerate(theirs)}


def _table(names: Mapping[Rows, str]) -> Table:
    table: Table = {}
    for rows, theirs in names.items():
        _enter(table, theirs, rows)
    return table


def _enter(table: Table, theirs: str, rows: Rows) -> None:
    module, _, leaf = theirs.rpartition(".")
    table.setdefault(module.replace(".", "_"), {}).setdefault(leaf, rows)
