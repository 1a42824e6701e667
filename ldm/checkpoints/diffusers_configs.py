"""The JSON files of a diffusers directory -> our config dataclasses; diffusers_written.py writes them.

What these files may say is far more than what is read here. So each setting is either translated, or known not to
matter to the networks, or has to have the one value that Stable Diffusion has; anything else is refused by name,
since a setting passed over is a wrong picture without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ldm.autoencoder.blocks import said_groups
from ldm.errors import UserError
from ldm.model_config import AutoencoderConfig, TextConfig, UNetConfig

Plain = Mapping[str, Any]
T = TypeVar("T", int, float, tuple[int, ...])

UNET_FIXED: Plain = {  # the value of Stable Diffusion, which is also diffusers' default; the only one that is read
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
}
AUTOENCODER_FIXED: Plain = {
    "act_fn": "silu",
}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}


def read_unet(plain: Plain, where: str) -> UNetConfig:
    """unet/config.json; raises UserError for a network that is not Stable Diffusion's."""
    refuse_others(plain, UNET_FIXED, where)
    widths = value(plain, "block_out_channels", (320, 640, 1280, 1280), where)
    default_down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    default_up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    down, up = _words(plain, "down_block_types", default_down), _words(plain, "up_block_types", default_up)
    attention = tuple(level for level, kind in enumerate(down) if kind == "CrossAttnDownBlock2D")
    if (down, up) != block_types(len(widths), attention):
        raise UserError(f"{where}: blocks {', '.join(map(str, (*down, *up)))} are not those of Stable Diffusion")
    # What diffusers calls attention_head_dim is the number of heads, unless num_attention_heads says it.
    heads = plain.get("num_attention_heads") or plain.get("attention_head_dim")
    heads = 8 if heads is None else heads
    by_level = _spread(heads, len(widths), "attention_head_dim", where)
    same = len(set(by_level)) == 1
    head_widths = {width // count for width, count in zip(widths, by_level, strict=True)}
    if not same and len(head_widths) != 1:
        raise UserError(f"{where}: attention_head_dim {heads} is neither one number of heads nor one width of them")
    given = plain.get("transformer_layers_per_block")
    depths = _spread(1 if given is None else given, len(widths), "transformer_layers_per_block", where)
    own = tuple(depths[level] for level in attention)  # the middle has as many as the last level, attended or not
    return UNetConfig(
        in_channels=value(plain, "in_channels", 4, where),
        out_channels=value(plain, "out_channels", 4, where),
        channels=widths[0],
        multipliers=_multipliers(widths, where),
        blocks=_one(plain, "layers_per_block", 2, len(widths), where),
        attention_levels=attention,
        transformer_depth=depths[-1],
        heads=by_level[0] if same else 0,
        head_width=0 if same else head_widths.pop(),
        context_width=_one(plain, "cross_attention_dim", 1280, len(widths), where),
        linear_projection=bool(plain.get("use_linear_projection", False)),
        dropout=value(plain, "dropout", 0.0, where),
        vector_width=_vector_width(plain, where),
        guidance_width=value(plain, "time_cond_proj_dim", 0, where),
        depths=() if set(own) <= {depths[-1]} else own,
    )


def _vector_width(plain: Plain, where: str) -> int:
    """V of a network that is told pooled text and sizes, as Stable Diffusion XL's; 0: it is told no vector."""
    kind, width = plain.get("addition_embed_type"), plain.get("projection_class_embeddings_input_dim")
    if kind not in (None, "text_time") or (kind is None) != (width is None):
        raise UserError(
            f"{where}: addition_embed_type is {str(kind)[:60]} and projection_class_embeddings_input_dim "
            f"{str(width)[:60]}; only networks with neither, or with text_time and a width, are read"
        )
    return 0 if kind is None else value(plain, "projection_class_embeddings_input_dim", 0, where)


def read_autoencoder(plain: Plain, where: str) -> AutoencoderConfig:
    """vae/config.json; raises UserError for a network that is not Stable Diffusion's."""
    refuse_others(plain, AUTOENCODER_FIXED, where)
    widths = value(plain, "block_out_channels", (64,), where)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if any(block != kind for block in _words(plain, name, (kind,))):
            raise UserError(f"{where}: {name} has blocks that are not {kind}, and no others can be read")
    convs = bool(plain.get("use_quant_conv", True))
    if bool(plain.get("use_post_quant_conv", True)) != convs:
        raise UserError(f"{where}: use_quant_conv and use_post_quant_conv differ, and only networks of both are read")
    groups = value(plain, "norm_num_groups", 32, where)
    if groups < 1:
        raise UserError(f"{where}: norm_num_groups is {groups} and should be at least 1")
    scale, channels = value(plain, "scaling_factor", 0.18215, where), value(plain, "latent_channels", 4, where)
    return AutoencoderConfig(
        in_channels=value(plain, "in_channels", 3, where),
        channels=widths[0],
        multipliers=_multipliers(widths, where),
        blocks=value(plain, "layers_per_block", 1, where),
        middle_attention=bool(plain.get("mid_block_add_attention", True)),
        latent_convs=convs,
        latent_channels=channels,
        norm_groups=said_groups(widths, groups),
        shift=_channels(plain, "latents_mean", channels, where) or (value(plain, "shift_factor", 0.0, where),),
        scale=tuple(scale / one for one in _channels(plain, "latents_std", channels, where) or (1.0,)),
    )


def read_text(plain: Plain, padding: str, where: str) -> TextConfig:
    """text_encoder/config.json, and what its tokenizer pads with; raises UserError if it is not CLIP's text tower."""
    width = value(plain, "hidden_size", 512, where)
    activation = plain.get("hidden_act", "quick_gelu")
    fixed = {"intermediate_size": 4 * width, "layer_norm_eps": 1e-5, "model_type": "clip_text_model"}
    refuse_others(plain, fixed, where)
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(f"{where}: hidden_act is '{activation}', and only quick_gelu and gelu are read")
    return TextConfig(
        context_length=value(plain, "max_position_embeddings", 77, where),
        vocabulary=value(plain, "vocab_size", 49408, where),
        width=width,
        heads=value(plain, "num_attention_heads", 8, where),
        layers=value(plain, "num_hidden_layers", 12, where),
        embed_dim=0,
        quick_gelu=activation == "quick_gelu",
        padding=padding,
        cleaning="plain",
    )


def block_types(levels: int, attention: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What diffusers calls the levels, down and up."""
    kinds = ["CrossAttn" if level in attention else "" for level in range(levels)]
    return tuple(f"{kind}DownBlock2D" for kind in kinds), tuple(f"{kind}UpBlock2D" for kind in reversed(kinds))


def refuse_others(plain: Plain, fixed: Plain, where: str) -> None:
    for name, value in {"quantization_config": None, **fixed}.items():
        if name in plain and plain[name] != value:
            found = str(plain[name])[:60]
            raise UserError(f"{where}: {name} is {found}, and only networks with {value} are read")


def value(plain: Plain, name: str, default: T, where: str) -> T:
    """A setting of the type of its default: int, float or a tuple of ints. Null means the default, as in diffusers."""
    found: Any = default if plain.get(name) is None else plain[name]
    if isinstance(default, float) and type(found) in (int, float) and abs(found) < 1e30:
        return type(default)(found)
    if isinstance(default, tuple) and isinstance(found, list | tuple) and {type(item) for item in found} == {int}:
        return type(default)(found)
    if isinstance(default, int) and type(found) is int:
        return found
    wanted = {int: "a whole number", float: "a number", tuple: "a list of whole numbers"}[type(default)]
    raise UserError(f"{where}: {name} is {str(found)[:60]} and should be {wanted}")


def latent_side(plain: Plain, where: str) -> int | None:
    """sample_size: of the latents that a network was trained on; None where it is not said, or not of a square."""
    if isinstance(plain.get("sample_size"), list | None):
        return None
    side = value(plain, "sample_size", 0, where)
    if side < 1:
        raise UserError(f"{where}: sample_size is {side} and should be at least 1")
    return side


def _channels(plain: Plain, name: str, count: int, where: str) -> tuple[float, ...]:
    """A number for each channel of the latent, or none. Deviations are positive."""
    found = plain.get(name) or []
    least = 1e-30 if name == "latents_std" else -1e30
    known = isinstance(found, list) and all(type(one) in (int, float) and least < one < 1e30 for one in found)
    if not known or len(found) not in (0, count):
        raise UserError(f"{where}: {name} is {str(found)[:60]} and should be a number for each channel")
    return tuple(map(float, found))


def _words(plain: Plain, name: str, default: Sequence[str]) -> tuple[str, ...]:
    """A list of words; anything else becomes words that no network has."""
    value = plain.get(name, default)
    return tuple(str(item)[:60] for item in value) if isinstance(value, list | tuple) else (str(value)[:60],)


def _spread(value: Any, levels: int, name: str, where: str) -> tuple[int, ...]:
    """One number for all levels, or a list of one for each."""
    found = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(found) != levels or not all(type(item) is int and item > 0 for item in found):
        raise UserError(f"{where}: {name} is {str(value)[:60]} and should be a whole number, or one for each level")
    return found


def _one(plain: Plain, name: str, default: int, levels: int, where: str) -> int:
    found = set(_spread(default if plain.get(name) is None else plain[name], levels, name, where))
    if len(found) > 1:
        raise UserError(f"{where}: {name} differs from level to level, and the U-Net here has one value for all levels")
    return found.pop()


def _multipliers(widths: Sequence[int], where: str) -> tuple[int, ...]:
    if widths[0] < 1 or any(width < 1 or width % widths[0] for width in widths):
        raise UserError(f"{where}: block_out_channels {list(widths)} are not multiples of their first, and have to be")
    return tuple(width // widths[0] for width in widths)
