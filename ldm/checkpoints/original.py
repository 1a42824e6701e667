"""The original single file of Stable Diffusion: names, what shapes tell, and the buffers that travel along.

model.diffusion_model.*                         the U-Net
model_ema.*                                     its running average, the dots of the names dropped
first_stage_model.*                             the autoencoder; stand-alone autoencoders have no prefix
cond_stage_model.transformer.text_model.*       v1's text tower, in Hugging Face's names
cond_stage_model.model.*                        v2's, in open_clip's, which are ours
conditioner.embedders.0., conditioner.embedders.1.    XL's towers, of either kind
betas, alphas_cumprod, ...                      the noise schedule, as tables
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.common_names import TRANSFORMER, clip_names
from ldm.checkpoints.state import Names, Rules, Shape, names_by, rename
from ldm.diffusion.schedule import make_schedule
from ldm.errors import UserError
from ldm.model_config import AutoencoderConfig, ModelConfig, ScheduleConfig, TextConfig, UNetConfig
from ldm.plain import parse_json
from ldm.ranges import MAX_STEPS
from ldm.settings import from_dict

CONFIG = "ldm.config"  # the metadata's key of our own config, in files that we wrote
UNET, EMA, AUTOENCODER = "model.diffusion_model.", "model_ema.", "first_stage_model."
CLIP_TEXT, OPEN_CLIP_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_TEXT = "conditioner.embedders."

UNUSED = (  # what nothing here reads, and why that is right
    r"^(lvlb_weights|logvar|scale_factor|(log_|sqrt_)?(one_minus_|recip(m1)?_)*(betas|alphas_cumprod(_prev)?))$",
    r"^posterior_(variance|log_variance_clipped|mean_coef[12])$",  # tables of the schedule
    r"^model_ema\.(decay|num_updates)$",
    r"\.position_ids$",  # 0, 1, 2, ...
    r"^(cond_stage_model|conditioner\.embedders\.\d)\.(model\.)?(logit_scale|attn_mask)$",  # of CLIP's training
    r"^denoiser\.sigmas$",  # a table of the schedule, which some merges of XL have
    r"^cond_stage_model\.text_projection$",
    r"^(first_stage_model\.)?loss\.",  # the discriminator and the perceptual network of the first stage's training
    r"^depth_model\.",  # v2 depth: the network that estimates the depth map (MiDaS)
)
_UNUSED = re.compile("|".join(UNUSED))

RESIDUAL: Rules = (
    (r"^norm_in", "in_layers.0"),
    (r"^conv_in", "in_layers.2"),
    (r"^embedding", "emb_layers.1"),
    (r"^norm_out", "out_layers.0"),
    (r"^conv_out", "out_layers.3"),
    (r"^shortcut", "skip_connection"),
)
ENDS: Rules = (
    (r"^time_embedding\.linear_in", "time_embed.0"),
    (r"^time_embedding\.linear_out", "time_embed.2"),
    (r"^guidance_embedding", "time_embedding.cond_proj"),  # as diffusers' script leaves it, which has no name for it
    (r"^vector_embedding\.linear_in", "label_emb.0.0"),
    (r"^vector_embedding\.linear_out", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^middle\.0\.residual\.", "middle_block.0."),
    (r"^middle\.0\.transformer\.", "middle_block.1."),
    (r"^middle\.1\.residual\.", "middle_block.2."),
)
FIRST_STAGE: Rules = (
    (r"^to_moments", "quant_conv"),
    (r"^from_latent", "post_quant_conv"),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"^(encoder.*)\.resample\.", r"\1.downsample."),
    (r"^(decoder.*)\.resample\.", r"\1.upsample."),
    (r"\.middle\.", ".mid."),
    (r"\.mid\.attention\.", ".mid.attn_1."),
    (r"\.query\.", ".q."),
    (r"\.key\.", ".k."),
    (r"\.value\.", ".v."),
    (r"\.out\.", ".proj_out."),
    (r"\.(norm|conv)_([12])\.", r".\1\2."),
    (r"\.shortcut\.", ".nin_shortcut."),
)
FIRST_STAGE_PLACES = (
    "encoder.down.{}.block.{}.conv1.weight",
    "encoder.mid.attn_1.q.weight",
    "encoder.down.{}.attn.0.q.weight",
)
"""What `autoencoder_of_shapes` looks for."""


def unused(name: str) -> bool:
    """Whether a tensor of that name, in an original file, is known and not needed."""
    return _UNUSED.search(name) is not None


# ---------------------------------------------------------------- names


def unet_names(keys: Iterable[str], config: UNetConfig) -> Names:
    """Our names -> theirs, with the prefix. Their blocks are numbered through all levels; ours know their level."""
    return names_by(keys, lambda key: UNET + _unet_name(key, config))


def _unet_name(name: str, config: UNetConfig) -> str:
    found = re.fullmatch(r"(down|up)\.(\d+)\.(?:stages\.(\d+)\.(residual|transformer)|resample)\.(.*)", name)
    if found is None:
        body, _, leaf = rename(name, ENDS).partition("middle_block.")
        if not leaf:
            return body
        place, _, leaf = leaf.partition(".")
        return f"middle_block.{place}.{rename(leaf, TRANSFORMER if place == '1' else RESIDUAL)}"
    way, level, stage, kind, leaf = found[1], int(found[2]), found[3], found[4], found[5]
    per_level = config.blocks + 1  # on the way down the change of size is a block of its own
    block = level * per_level + int(stage or config.blocks) + (way == "down")
    place = f"{'input' if way == 'down' else 'output'}_blocks.{block}"
    if kind == "residual":
        return f"{place}.0.{rename(leaf, RESIDUAL)}"
    if kind == "transformer":
        return f"{place}.1.{rename(leaf, TRANSFORMER)}"
    if way == "down":
        return f"{place}.0.{leaf.replace('conv', 'op')}"
    attends = len(config.multipliers) - 1 - level in config.attention_levels  # the way up begins at the last level
    return f"{place}.{2 if attends else 1}.{leaf}"


def ema_names(names: Names) -> Names:
    """The names of the average of what `unet_names` gives: "model." becomes "model_ema.", the other dots go."""
    return {ours: tuple(EMA + name.removeprefix("model.").replace(".", "") for name in names[ours]) for ours in names}


def autoencoder_names(keys: Iterable[str], config: AutoencoderConfig, prefix: str = AUTOENCODER) -> Names:
    """Our names -> theirs. Their decoder counts levels from the finest, as the encoder does; ours in their order."""
    last = len(config.multipliers) - 1

    def translate(key: str) -> str:
        key = re.sub(r"^decoder\.levels\.(\d+)", lambda found: f"decoder.up.{last - int(found[1])}", key)
        return prefix + rename(key, FIRST_STAGE)

    return names_by(keys, translate)


def text_names(keys: Iterable[str], prefix: str) -> Names:
    """Our names -> theirs; `prefix` is one that `text_prefixes` found."""
    if in_open_clip(prefix):
        return names_by(keys, lambda key: prefix + key)
    return clip_names(keys, prefix)


def text_prefixes(names: Iterable[str]) -> list[str]:
    """What stands before each text tower's names, and with it whose names they are; XL's in their order."""
    tail = "token_embedding.weight"
    found = (name for name in names if name.startswith((CLIP_TEXT, OPEN_CLIP_TEXT, XL_TEXT)) and name.endswith(tail))
    return sorted(name.removesuffix(tail).removesuffix("embeddings.") for name in found)


def in_open_clip(prefix: str) -> bool:
    """Whether names behind a text tower's prefix are open_clip's, and not Hugging Face's."""
    return prefix.endswith(".model.")


# ---------------------------------------------------------------- what shapes tell


def unet_config(shapes: Mapping[str, Shape]) -> UNetConfig:
    """The architecture of the U-Net whose tensors (without the prefix) have these shapes; raises UserError."""
    widths: list[list[int]] = [[]]  # of the residual blocks on each level, on the way down
    attention: dict[int, int] = {}  # level -> blocks of its transformers
    block = 1
    try:
        channels, in_channels = shapes["input_blocks.0.0.weight"][:2]
        while True:
            place = f"input_blocks.{block}."
            if f"{place}0.op.weight" in shapes:
                widths.append([])
            elif f"{place}0.in_layers.2.weight" in shapes:
                widths[-1].append(shapes[f"{place}0.in_layers.2.weight"][0])
                if f"{place}1.norm.weight" in shapes:
                    attention[len(widths) - 1] = _depth(shapes, f"{place}1.")
            else:
                break
            block += 1
        middle = "middle_block.1."
        linear = len(shapes[f"{middle}proj_in.weight"]) == 2
        context_width = shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1]
        depth = _depth(shapes, middle)
        return UNetConfig(
            in_channels=in_channels,
            out_channels=shapes["out.2.weight"][0],
            channels=channels,
            multipliers=tuple(level[0] // channels for level in widths),
            blocks=len(widths[0]),
            attention_levels=tuple(attention),
            transformer_depth=depth,
            heads=0 if linear else 8,
            head_width=64 if linear else 0,
            context_width=context_width,
            linear_projection=linear,
            vector_width=shapes.get("label_emb.0.0.weight", (0, 0))[1],
            guidance_width=shapes.get("time_embedding.cond_proj.weight", (0, 0))[1],
            depths=() if set(attention.values()) <= {depth} else tuple(attention.values()),
        )
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"the U-Net is not built as Stable Diffusion's ({error}), and no other kind can be read"
        ) from error


def _depth(shapes: Mapping[str, Shape], place: str) -> int:
    """How many blocks the transformer at `place` has."""
    start = f"{place}transformer_blocks."
    return 1 + max(int(name.removeprefix(start).split(".")[0]) for name in shapes if name.startswith(start))


def text_config(shapes: Mapping[str, Shape], prefix: str) -> TextConfig:
    """The same of the text tower; `shapes` are without `prefix`."""
    open_clip = in_open_clip(prefix)
    embeddings = "" if open_clip else "embeddings."
    try:
        vocabulary, width = shapes[f"{embeddings}token_embedding.weight"]
        length = shapes["positional_embedding" if open_clip else "embeddings.position_embedding.weight"][0]
        place = r"transformer\.resblocks\.(\d+)\." if open_clip else r"encoder\.layers\.(\d+)\."
        layers = 1 + max(int(found[1]) for name in shapes if (found := re.match(place, name)))
        projection = shapes.get("text_projection", (0, 0)) if open_clip else (0, 0)
        return TextConfig(
            context_length=length,
            vocabulary=vocabulary,
            width=width,
            heads=max(width // 64, 1),
            layers=layers,
            embed_dim=projection[1],
            quick_gelu=not open_clip,
            layer="penultimate" if open_clip and layers != 23 else "last",
            padding="zero" if open_clip else "eot",
            cleaning="open_clip" if open_clip else "plain",
        )
    except (LookupError, ValueError) as error:
        raise UserError(f"the text tower is not built as CLIP's ({error}), and no other kind can be read") from error


def own_config(metadata: Mapping[str, str], path: Path) -> ModelConfig | None:
    """That of a file that we wrote; raises UserError for one that cannot be read."""
    where = f"the config in {path}"
    return from_dict(ModelConfig, parse_json(metadata[CONFIG], where), where) if metadata.get(CONFIG) else None


# ---------------------------------------------------------------- the schedule's tables


def tables(config: ScheduleConfig) -> dict[str, Tensor]:
    """The twelve float32 tables (T,) of the schedule that an original file carries (Ho et al. 2020, eq. 4, 6, 7)."""
    alphas_bar = make_schedule(config).alphas_cumprod
    before = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
    betas = 1 - alphas_bar / before
    variance = betas * (1 - before) / (1 - alphas_bar)
    found = {
        "betas": betas,
        "alphas_cumprod": alphas_bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alphas_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas_bar).log(),
        "sqrt_recip_alphas_cumprod": alphas_bar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas_bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - alphas_bar),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - alphas_bar),
    }
    return {name: table.float() for name, table in found.items()}


def schedule_of(
    alphas_bar: Tensor, betas: Tensor | None = None, likely: Sequence[ScheduleConfig] = ()
) -> ScheduleConfig | None:
    """The schedule whose tables `alphas_cumprod` and `betas` (T,) these are, to their precision; None: none known.

    `likely` ones are tried first. Without `betas`, or after a rescaling to zero terminal SNR, ends of the betas other
    than theirs and Stable Diffusion's are not found.
    """
    steps = len(alphas_bar) if alphas_bar.ndim == 1 else 0
    if not 2 <= steps <= MAX_STEPS:
        return None
    table = alphas_bar.double().cpu()
    rtol, atol = _grain(table)
    candidates = [*likely, ScheduleConfig(steps=steps)]
    if betas is not None and betas.shape == table.shape:
        start, end = (float(f"{float(betas[i]):.3g}") for i in (0, -1))  # as they were written, before any rounding
        candidates += [ScheduleConfig(kind, steps, start, end) for kind in ("scaled_linear", "linear")]
    candidates += [ScheduleConfig("linear", steps, 1e-4, 0.02), ScheduleConfig("cosine", steps)]
    fitting = []
    candidates = [config for config in candidates if config.steps == steps]  # a file may say any number of steps
    for config in [*candidates, *(replace(config, zero_terminal_snr=True) for config in candidates)]:
        try:
            made = make_schedule(config).alphas_cumprod
        except UserError:
            continue
        if bool(torch.isclose(made, table, rtol=rtol, atol=atol).all()):
            fitting.append((float((made - table).abs().mean()), config))
    # Where the numbers are coarse several fit: the first of those that fit about as well as the best.
    least = min((error for error, _ in fitting), default=0.0)
    return next((config for error, config in fitting if error <= 2 * least + 1e-6), None)


def _grain(table: Tensor) -> tuple[float, float]:
    """The relative and absolute tolerance to which a table is known: of the shortest floats that hold all its numbers,
    since a file may have been cast more than once; not finer than float16's.
    """
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16):
        if torch.equal(table.to(dtype).double(), table):
            limits = torch.finfo(dtype)
            return limits.eps, limits.eps * limits.smallest_normal
    return 2e-3, 2e-5
