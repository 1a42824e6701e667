"""Names that several foreign formats share: the spatial transformer's, and Hugging Face's of the CLIP text tower."""

from __future__ import annotations

from collections.abc import Iterable

from ldm.checkpoints.state import Names, Rules, rename

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


def clip_names(keys: Iterable[str], prefix: str = "text_model.") -> Names:
    """open_clip's names (ours) -> Hugging Face's, in which q, k and v are three; the projection has no place there."""
    names = {}
    for key in keys:
        if ".attn.in_proj_" in key:
            layer, kind = rename(key, CLIP).split(".attn.in_proj_")
            names[key] = tuple(f"{prefix}{layer}.self_attn.{which}_proj.{kind}" for which in "qkv")
        elif key != "text_projection":
            names[key] = (prefix + rename(key, CLIP),)
    return names
