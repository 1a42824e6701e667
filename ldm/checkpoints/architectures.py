"""The architectures that are known by name, as values, and what no checkpoint's keys tell about them.

Shapes tell almost everything about a Stable Diffusion checkpoint (`original.py` reads them). The rest stands here, as
rules that hold for the models as published; a config beside the weights goes before them, and the user before both:

    heads           of an attention with linear projections (v2) are 64 wide; with convolutions (v1) there are 8
    prediction      eps; v for v2 of 4 channels, which at 768 pixels has the same keys as its base that predicts eps; v
                    where the schedule ends in pure noise
    picture size    512; 768 for v2 where v is predicted
    text, v1        CLIP ViT-L/14 in Hugging Face's names: quick GELU, last block, padded with the end token; prompts
                    are read as Hugging Face's tokenizer reads them
    text, v2        OpenCLIP ViT-H/14: exact GELU, the last block but one, padded with 0; where a file has 23 blocks the
                    24th was left out as unused, and its last block is meant; prompts are read as open_clip reads them
    noise           scaled linear betas, 0.00085 to 0.012 over 1000 steps
    latent          0.18215 times the autoencoder's
    XL              a U-Net that takes a vector: eps, 1024 pixels, the rest in sdxl.py
    LCM             a U-Net that is told its guidance scale is drawn as a latent consistency model
"""

from __future__ import annotations

from dataclasses import replace

from ldm.model_config import (
    AutoencoderConfig,
    DrawingConfig,
    EncoderConfig,
    MMDiTConfig,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
)

CLIP_L = TextConfig(
    width=768, heads=12, layers=12, embed_dim=0, quick_gelu=True, layer="last", padding="eot", cleaning="plain"
)
OPENCLIP_H = TextConfig(
    width=1024, heads=16, layers=24, embed_dim=1024, layer="penultimate", padding="zero", cleaning="open_clip"
)
V1_UNET = UNetConfig()
V2_UNET = UNetConfig(heads=0, head_width=64, context_width=1024, linear_projection=True)

SD_V1 = ModelConfig(AutoencoderConfig(), CLIP_L, V1_UNET, ScheduleConfig(), parameterization="eps", image_size=512)
SD_V1_INPAINTING = replace(SD_V1, unet=replace(V1_UNET, in_channels=9))
SD_V2 = ModelConfig(AutoencoderConfig(), OPENCLIP_H, V2_UNET, ScheduleConfig(), parameterization="v", image_size=768)
SD_V2_BASE = replace(SD_V2, parameterization="eps", image_size=512)
SD_V2_INPAINTING = replace(SD_V2_BASE, unet=replace(V2_UNET, in_channels=9))
SD_V2_DEPTH = replace(SD_V2_BASE, unet=replace(V2_UNET, in_channels=5))

KNOWN = {
    "Stable Diffusion v1": SD_V1,
    "Stable Diffusion v1 inpainting": SD_V1_INPAINTING,
    "Stable Diffusion v2": SD_V2,
    "Stable Diffusion v2 base": SD_V2_BASE,
    "Stable Diffusion v2 inpainting": SD_V2_INPAINTING,
    "Stable Diffusion v2 depth": SD_V2_DEPTH,
}

CLIP_L_XL = replace(CLIP_L, layer="penultimate", final_norm=False)
OPENCLIP_BIGG = TextConfig(
    width=1280,
    heads=20,
    layers=32,
    embed_dim=1280,
    layer="penultimate",
    padding="zero",
    cleaning="open_clip",
    final_norm=False,
)
XL_UNET = replace(
    V2_UNET,
    multipliers=(1, 2, 4),
    attention_levels=(1, 2),
    transformer_depth=10,
    depths=(2, 10),
    context_width=2048,
    vector_width=2816,
)
SD_XL = ModelConfig(
    AutoencoderConfig(scale=(0.13025,)),
    CLIP_L_XL,
    XL_UNET,
    ScheduleConfig(),
    parameterization="eps",
    image_size=1024,
    encoder=EncoderConfig(pooled=True, sizes=256, empty="zeros"),
    text_2=OPENCLIP_BIGG,
)
SD_XL_REFINER = replace(
    SD_XL,
    text=OPENCLIP_BIGG,
    text_2=None,
    unet=replace(
        XL_UNET,
        channels=384,
        multipliers=(1, 2, 4, 4),
        transformer_depth=4,
        depths=(),
        context_width=1280,
        vector_width=2560,
    ),
    encoder=EncoderConfig(pooled=True, sizes=256, score=True),
)
KNOWN |= {"Stable Diffusion XL": SD_XL, "Stable Diffusion XL refiner": SD_XL_REFINER}

TRANSFORMERS = {
    "Stable Diffusion 3 medium": MMDiTConfig(),
    "Stable Diffusion 3.5 medium": MMDiTConfig(qk_norm=True, second_attention=13, grid=384),
    "Stable Diffusion 3.5 large": MMDiTConfig(width=2432, depth=38, heads=38, qk_norm=True),
}

LCM = DrawingConfig(8.5, 4, "lcm", "lcm")  # of a latent consistency model that is told its scale (Luo et al. 2023)

MASK, DEPTH = 5, 1  # channels beside the latent's: a mask and the masked picture's latent; a depth map


def name_of(config: ModelConfig) -> str:
    """The known architecture that `config` is, or what it has: "U-Net and autoencoder"."""
    named = {mmdit: name for name, mmdit in TRANSFORMERS.items()}
    if isinstance(config.unet, MMDiTConfig):
        return named.get(replace(config.unet, side=MMDiTConfig.side), "transformer of our own")
    for name, known in KNOWN.items():
        if _shape(config) == _shape(known):
            return name
    words = {"unet": "U-Net", "autoencoder": "autoencoder", "text": "text tower", "text_2": "second text tower"}
    words["t5"] = "T5"
    return " and ".join(word for part, word in words.items() if getattr(config, part) is not None) or "nothing"


def extra_channels(config: ModelConfig) -> int:
    """How many channels the U-Net takes beside the latent's: 0, 5 for inpainting, 1 for depth."""
    if config.unet is None or config.autoencoder is None:
        return 0
    return config.unet.in_channels - config.autoencoder.channels_of_latent


def assumed_prediction(config: ModelConfig) -> str:
    """eps or v, where nothing says which: see the rules above."""
    assert isinstance(config.unet, UNetConfig)
    if config.schedule is not None and config.schedule.zero_terminal_snr:
        return "v"  # the last level is pure noise, in which eps says nothing of a picture
    if config.unet.vector_width:
        return "eps"
    return "v" if config.unet.linear_projection and config.unet.in_channels == config.unet.out_channels else "eps"


def assumed_side(config: ModelConfig) -> int:
    """The pictures' size where nothing says it: see the rules above."""
    if isinstance(config.unet, UNetConfig) and config.unet.vector_width:
        return 1024
    v2 = isinstance(config.unet, UNetConfig) and config.unet.linear_projection
    return 768 if v2 and config.parameterization == "v" else 512


def _shape(config: ModelConfig) -> tuple[object, ...]:
    """What distinguishes the known ones; whether a text tower keeps what it does not use does not count, nor that the
    guidance scale is told."""
    towers = tuple(
        replace(
            tower, embed_dim=0, layers=tower.layers - (tower.layer == "penultimate"), layer="last", cleaning="plain"
        )
        for tower in config.towers.values()
    )
    unet = config.unet
    if isinstance(unet, UNetConfig):
        heads = tuple(unet.heads or unet.channels * m // unet.head_width for m in unet.multipliers)
        unet = replace(unet, heads=0, head_width=0, attention_levels=tuple(sorted(unet.attention_levels)))
        unet = replace(unet, guidance_width=0)
        return config.autoencoder, towers, unet, heads, config.parameterization
    return config.autoencoder, towers, unet, config.parameterization
