"""The MMDiT in foreign files: Stability's names and diffusers', what shapes tell of it, and diffusers' config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.changed import Changed, Made
from ldm.checkpoints.diffusers_configs import Plain, refuse_others, value
from ldm.checkpoints.state import Names, Rules, Shape, Source, names_by, rename
from ldm.errors import UserError
from ldm.model_config import MMDiTConfig

HEAD = 64  # width of a head in all published ones

ORIGINAL: Rules = (
    (r"^positions$", "pos_embed"),
    (r"^patches\.", "x_embedder.proj."),
    (r"^time_embedding\.", "t_embedder."),
    (r"^vector_embedding\.", "y_embedder."),
    (r"\.linear_in\.", ".mlp.0."),
    (r"\.linear_out\.", ".mlp.2."),
    (r"^context_in\.", "context_embedder."),
    (r"^modulation_out\.", "final_layer.adaLN_modulation.1."),
    (r"^out\.", "final_layer.linear."),
    (r"^blocks\.(\d+)\.image\.", r"joint_blocks.\1.x_block."),
    (r"^blocks\.(\d+)\.context\.", r"joint_blocks.\1.context_block."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"\.attention\.", ".attn."),
    (r"\.second\.", ".attn2."),
    (r"\.norm_([qk])\.", r".ln_\1."),
    (r"(attn2?)\.out\.", r"\1.proj."),
    (r"_block\.mlp\.0\.", "_block.mlp.fc1."),
    (r"_block\.mlp\.2\.", "_block.mlp.fc2."),
)
DIFFUSERS: Rules = (
    (r"^positions$", "pos_embed.pos_embed"),
    (r"^patches\.", "pos_embed.proj."),
    (r"^time_embedding\.", "time_text_embed.timestep_embedder."),
    (r"^vector_embedding\.", "time_text_embed.text_embedder."),
    (r"\.linear_in\.", ".linear_1."),
    (r"\.linear_out\.", ".linear_2."),
    (r"^context_in\.", "context_embedder."),
    (r"^modulation_out\.", "norm_out.linear."),
    (r"^out\.", "proj_out."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.image\.modulation\.", ".norm1.linear."),
    (r"\.context\.modulation\.", ".norm1_context.linear."),
    (r"\.image\.mlp\.", ".ff.net."),
    (r"\.context\.mlp\.", ".ff_context.net."),
    (r"\.net\.0\.", ".net.0.proj."),
    (r"\.image\.second\.", ".attn2."),
    (r"\.image\.attention\.", ".attn."),
    (r"(attn2?)\.out\.", r"\1.to_out.0."),
    (r"\.context\.attention\.norm_", ".attn.norm_added_"),
    (r"\.context\.attention\.out\.", ".attn.to_add_out."),
    (r"(attn2?)\.qkv\.", r"\1.to_{}."),
    (r"\.context\.attention\.qkv\.", ".attn.add_{}_proj."),
)
FIXED: Plain = {"norm_type": None}


def original_names(keys: Iterable[str], prefix: str = "") -> Names:
    """Our names -> Stability's."""
    return names_by(keys, lambda key: prefix + rename(key, ORIGINAL))


def diffusers_names(keys: Iterable[str]) -> Names:
    """Our names -> diffusers', in which queries, keys and values are three."""
    theirs = {key: rename(key, DIFFUSERS) for key in keys}
    return {
        key: tuple(name.format(which) for which in "qkv") if "{}" in name else (name,) for key, name in theirs.items()
    }


# ---------------------------------------------------------------- the order of shift and scale


def halves_in_order(source: Source) -> Source:
    """diffusers' tensors with shift before scale in the last modulations too, as everywhere else here.

    Theirs are (scale, shift) where an AdaLayerNormContinuous makes them: at the end, and of the last context.
    """

    def made(name: str) -> Made:
        return Made(source.form(name)[1], lambda: halves_swapped(source[name]), name)

    return Changed(source, {name: made(name) for name in swapped_names(source) if name in source})


def swapped_names(names: Iterable[str]) -> set[str]:
    """Those of diffusers' `names` whose two halves are the other way round here."""
    places = [re.fullmatch(r"transformer_blocks\.(\d+)\.norm1_context\.linear\.(weight|bias)", name) for name in names]
    last = max((int(place[1]) for place in places if place), default=-1)
    leaves = ("weight", "bias")
    starts = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    return {f"{start}.{leaf}" for start in starts for leaf in leaves}


def halves_swapped(value: Tensor) -> Tensor:
    """(2 W, ...) -> the second half, then the first; its own inverse."""
    return torch.cat(value.chunk(2)[::-1])


# ---------------------------------------------------------------- what files say


def config_of_shapes(shapes: Mapping[str, Shape]) -> MMDiTConfig:
    """The architecture of the MMDiT whose tensors, in Stability's names without a prefix, have these shapes.

    Raises UserError for another network.
    """
    try:
        width, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
        grid = math.isqrt(shapes["pos_embed"][1])
        depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("joint_blocks."))
        norms = "joint_blocks.0.x_block.attn.ln_q.weight"
        second = [name for name in shapes if re.fullmatch(r"joint_blocks\.\d+\.x_block\.attn2\.qkv\.weight", name)]
        return MMDiTConfig(
            in_channels=in_channels,
            out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
            patch=patch,
            width=width,
            depth=depth,
            heads=width // (shapes[norms][0] if norms in shapes else min(HEAD, width)),
            context_width=shapes["context_embedder.weight"][1],
            vector_width=shapes["y_embedder.mlp.0.weight"][1],
            qk_norm=norms in shapes,
            second_attention=len(second),
            grid=grid,
            side=min(MMDiTConfig.side, grid),
        )
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"the transformer is not built as Stable Diffusion 3's ({error}), and no other kind can be read"
        ) from error


def read_config(plain: Plain, where: str) -> MMDiTConfig:
    """transformer/config.json; raises UserError for a network that is not Stable Diffusion 3's."""
    refuse_others(plain, FIXED, where)
    heads = value(plain, "num_attention_heads", 18, where)
    width = heads * value(plain, "attention_head_dim", 64, where)
    if value(plain, "caption_projection_dim", 1152, where) != width:
        raise UserError(f"{where}: caption_projection_dim is not {width}, the width of the tokens")
    norm = plain.get("qk_norm")
    if norm not in (None, "rms_norm"):
        raise UserError(f"{where}: qk_norm is '{str(norm)[:40]}', and only rms_norm is read")
    second = plain.get("dual_attention_layers") or []
    if not isinstance(second, list | tuple) or list(second) != list(range(len(second))):
        raise UserError(f"{where}: dual_attention_layers are not the first ones, and only such networks are read")
    patch, grid = value(plain, "patch_size", 2, where), value(plain, "pos_embed_max_size", 96, where)
    return MMDiTConfig(
        in_channels=value(plain, "in_channels", 16, where),
        out_channels=value(plain, "out_channels", 16, where),
        patch=patch,
        width=width,
        depth=value(plain, "num_layers", 18, where),
        heads=heads,
        context_width=value(plain, "joint_attention_dim", 4096, where),
        vector_width=value(plain, "pooled_projection_dim", 2048, where),
        qk_norm=norm is not None,
        second_attention=len(second),
        grid=grid,
        side=max(1, min(value(plain, "sample_size", 128, where) // max(patch, 1), grid)),
    )


def write_config(config: MMDiTConfig, latent_side: int) -> dict[str, Any]:
    """transformer/config.json of a network of two streams."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": latent_side,
        "patch_size": config.patch,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.width // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.vector_width,
        "pos_embed_max_size": config.grid,
        "dual_attention_layers": list(range(config.second_attention)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }
