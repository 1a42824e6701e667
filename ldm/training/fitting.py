"""Whether the parts of a model that is to be trained, its data and its settings fit each other."""

from __future__ import annotations

from ldm.conditioning.encoder import Encoder
from ldm.conditioning.planes import kind_of_planes
from ldm.config import DataConfig, FiguresConfig
from ldm.errors import UserError
from ldm.training.begin import Beginning
from ldm.training.preflight import check_no_depth, check_no_label, check_no_score, check_sides


def check_fits(began: Beginning, data: DataConfig, latents: str = "", figures: FiguresConfig = FiguresConfig()) -> str:
    """The planes that the network takes: "mask" (with the masked picture), "depth" or "" for none.

    Raises UserError, with the setting that mends it, unless all fits.
    """
    if not figures.pictures and figures != FiguresConfig():
        raise UserError("figures.pictures is 0, which measures nothing; set it, or leave out the rest of figures")
    model = began.config.unet
    assert model is not None
    encoder = Encoder(began.towers, began.config.encoder, model.classes)
    check_sides(data, began.codec.factor)
    if not model.classes:
        check_no_label(data)
    elif not data.label:
        raise UserError(
            f"model.classes is {model.classes} and data.label is not set; say data.label=FIELD, the field of the "
            "samples' json that says the class, or set model.classes=0"
        )
    if not encoder.config.score:
        check_no_score(data)
    elif not data.score:
        raise UserError(
            "encoder.score asks for an aesthetic score of each picture, and data.score is not set; say "
            "data.score=FIELD, the field of the samples' json that says it, or leave encoder.score out"
        )
    if model.vector_width != encoder.vector_width:
        raise UserError(
            f"model.vector_width is {model.vector_width} and the vector made of encoder.pooled and encoder.sizes "
            f"{encoder.vector_width} wide; set model.vector_width={encoder.vector_width}"
        )
    takes = _check_channels(began, latents)
    if takes == "depth" and not data.depth:
        raise UserError(
            f"the U-Net has {model.in_channels} input channels, one more than the latent, for a depth map, and "
            "data.depth is not set; say data.depth=MEMBER, the name's end of the samples' depth maps, or set "
            f"model.in_channels={model.in_channels - 1}"
        )
    if takes == "depth" and figures.pictures:
        raise UserError(
            "figures.pictures asks for pictures of captions, and this network draws after a depth map; "
            "set figures.pictures=0"
        )
    if takes != "depth":
        check_no_depth(data)
    if not began.towers and figures.pictures:
        raise UserError(
            "figures.pictures asks for pictures of captions, and a model without a text tower draws none; "
            "set figures.pictures=0"
        )
    if began.towers and encoder.context_width != model.context_width:
        whose = "text tower's width is" if len(began.towers) == 1 else "text towers' widths add up to"
        raise UserError(f"the {whose} {encoder.context_width}; set model.context_width={encoder.context_width}")
    return takes


def _check_channels(began: Beginning, latents: str) -> str:
    model, channels, learned = began.config.unet, began.codec.latent_channels, began.config.learned_variance
    assert model is not None
    wanted = channels * (1 + learned)
    takes = kind_of_planes(model.in_channels - channels, channels)
    if model.out_channels != wanted or (model.in_channels != channels and not takes):
        why = ", and as many again say the learned variance" if learned else ""
        raise UserError(
            f"the U-Net has {model.in_channels} input and {model.out_channels} output channels but latents have "
            f"{channels}{why}; set model.in_channels={channels} model.out_channels={wanted}"
            f" (or model.in_channels={2 * channels + 1} for one that inpaints, {channels + 1} for one told a depth map)"
        )
    if takes and latents:
        given = "masked pictures" if takes == "mask" else "depth maps"
        raise UserError(
            f"the U-Net has {model.in_channels} input channels for a network that is trained on {given}, and cached "
            f"latents have none; leave out latents=, or set model.in_channels={channels}"
        )
    return takes
