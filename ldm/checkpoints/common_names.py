"""What several foreign formats share: the spatial transformer's names, Hugging Face's of the CLIP text tower, and how
shapes tell an autoencoder's architecture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from ldm.autoencoder.blocks import said_groups
from ldm.checkpoints.state import Names, Rules, Shape, rename
from ldm.errors import UserError
from ldm.model_config import AutoencoderConfig

GROUPS = 32  # of every norm, in all of these networks, where no config.json says another number

TRANSFORMER: Rules = (
    (r"\bproject_(in|out)\b", r"proj_\1"),
    (r"\bblocks\b", "transformer_blocks"),
    (r"\bnorm_self\b", "norm1"),
    (r"\bnorm_cross\b", "norm2"),
    (r"\bnorm_feed_forward\b", "norm3"),
    (r"\bself_attention\b", "attn1"),
    (r"\bcross_attention\b", "attn2"),
    (r"\bquery\b", "to_q"),
    (r"\bkey\b", "to_k"),
    (r"\bvalue\b", "to_v"),
    (r"(attn\d)\.out\b", r"\1.to_out.0"),
    (r"\bfeed_forward\.linear_in\b", "ff.net.0.proj"),
    (r"\bfeed_forward\.linear_out\b", "ff.net.2"),
)
"""What stands in a SpatialTransformer -> what CompVis and diffusers call it."""

CLIP: Rules = (
    (r"^token_embedding", "embeddings.token_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final", "final_layer_norm"),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)


def clip_names(keys: Iterable[str], prefix: str = "text_model.", projection: str = "") -> Names:
    """open_clip's names (ours) -> Hugging Face's, in which q, k and v are three; the projection is called `projection`,
    where it has a place."""
    names = {}
    for key in keys:
        if ".attn.in_proj_" in key:
            layer, kind = rename(key, CLIP).split(".attn.in_proj_")
            names[key] = tuple(f"{prefix}{layer}.self_attn.{which}_proj.{kind}" for which in "qkv")
        elif key != "text_projection":
            names[key] = (prefix + rename(key, CLIP),)
        elif projection:
            names[key] = (projection,)
    return names


def autoencoder_of_shapes(
    shapes: Mapping[str, Shape], where: object, block: str, middle: str, attention: str = ""
) -> AutoencoderConfig:
    """The architecture of the autoencoder whose tensors (without a prefix) have these shapes; its shift and scale are
    Stable Diffusion's. Raises UserError for another network.

    The three are names of tensors: of the convolution in block {1} of level {0}, of the attention in the middle, and
    of that on level {0}, where the format has any.
    """
    try:
        channels, in_channels = shapes["encoder.conv_in.weight"][:2]
        levels = list(itertools.takewhile(lambda level: block.format(level, 0) in shapes, itertools.count()))
        widths = [shapes[block.format(level, 0)][0] for level in levels]
        return AutoencoderConfig(
            in_channels=in_channels,
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            blocks=next(count for count in itertools.count() if block.format(0, count) not in shapes),
            attention_levels=tuple(level for level in levels if attention.format(level) in shapes),
            middle_attention=middle in shapes,
            latent_channels=shapes["decoder.conv_in.weight"][1],
            latent_convs="post_quant_conv.weight" in shapes,
            norm_groups=said_groups(widths, GROUPS),
        )
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"the autoencoder in {where} is not built as Stable Diffusion's ({error}), and no other kind can be read"
        ) from error
