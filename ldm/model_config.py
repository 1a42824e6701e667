"""What a model is, as frozen dataclasses: this travels inside the checkpoint. config.py has the settings of trainings.

A field's type says its range (ranges.py), and the comment on its line is what `--help` says of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ldm.ranges import Count, Counts, Decay, Filled, NotNegative, Positive, Range, Share, Side, Steps, Whole

TOWERS = ("text", "text_2")  # parts of a model that read captions; a model with one calls it `text`


@dataclass(frozen=True)
class AutoencoderConfig:
    """Picture <-> latent. f = patch * 2 ** (len(multipliers) - 1). The defaults are Stable Diffusion's."""

    kind: str = "kl"  # kl, or identity: no compression, everything downstream becomes a pixel model
    in_channels: Count = 3  # of a picture
    channels: Count = 128  # of the finest level, a multiple of 4
    multipliers: Counts = (1, 2, 4, 4)  # of channels on each level; a level is half the size of the one before
    blocks: Count = 2  # residual blocks on each level of the encoder; the decoder has one more
    attention_levels: tuple[Whole, ...] = ()  # levels (0 = full size) with self-attention, beside the middle
    middle_attention: bool = True  # self-attention on the coarsest level, between encoder and decoder
    latent_channels: Count = 4  # of the latent
    patch: Count = 1  # side of the pixel-unshuffle before the first convolution; 1 is none
    norm_groups: Whole = 0  # of each normalization; 0: 32, and fewer where a level has fewer than 128 channels
    latent_convs: bool = True  # 1x1 convolutions behind the encoder and before the decoder; SD 3 has none
    shift: Annotated[tuple[float, ...], Filled()] = (0.0,)  # one, or one for each channel
    scale: Annotated[tuple[Positive, ...], Filled()] = (0.18215,)  # latent = (posterior sample - shift) * scale

    @property
    def factor(self) -> int:
        """Picture side / latent side, f."""
        return 1 if self.kind == "identity" else self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def channels_of_latent(self) -> int:
        return self.in_channels if self.kind == "identity" else self.latent_channels


@dataclass(frozen=True)
class TextConfig:
    """The CLIP text tower. `arch` names an open_clip architecture; if empty, the numbers below are ours."""

    arch: str = ""  # an open_clip architecture, as ViT-L-14-quickgelu; empty: the numbers below
    context_length: Count = 77  # tokens, start and end among them
    vocabulary: Count = 49408  # rows of the token embedding when `token_ids` is empty
    token_ids: tuple[Whole, ...] = ()  # tokens that own a row, in order; all others share one more row at the end
    width: Count = 512  # of the context
    heads: Count = 8  # of each attention, divisors of the width
    layers: Count = 12  # blocks of attention and MLP
    embed_dim: Whole = 512  # width of the joint picture-text space
    quick_gelu: bool = False  # x * sigmoid(1.702 x) in place of the GELU (OpenAI's weights)
    layer: str = "last"  # last or penultimate block; the final LayerNorm follows either, unless it is left out
    padding: str = "zero"  # zero (OpenCLIP, SD v2) or eot (Hugging Face, SD v1)
    cleaning: str = "open_clip"  # of prompts: open_clip (ftfy, HTML entities), or plain, as Hugging Face's tokenizer
    final_norm: bool = True  # false: the context is the block's output as it is (SDXL, SD 3)


@dataclass(frozen=True)
class T5Config:
    """The encoder of T5 1.1 (Raffel et al. 2020), gated GELU. The defaults are XXL's, which Stable Diffusion 3 has."""

    vocabulary: Count = 32128  # rows of the token embedding
    width: Count = 4096  # of the context
    heads: Count = 64  # of each attention
    head_width: Count = 64
    hidden: Count = 10240  # width inside the MLP
    layers: Count = 24  # blocks of attention and MLP
    buckets: Count = 32  # of relative positions
    tokenizer: Whole = 0  # bytes of its tokenizer.json, kept among its weights; 0: there is none


@dataclass(frozen=True)
class UNetConfig:
    """Noisy latent, t, context -> prediction. The defaults are Stable Diffusion v1's."""

    in_channels: Count = 4  # those of the latent
    out_channels: Count = 4  # the same, or twice as many with learned_variance
    channels: Count = 320  # of the finest level, even
    multipliers: Counts = (1, 2, 4, 4)  # of channels on each level; a level is half the size of the one before
    blocks: Count = 2  # residual blocks on each level down; one more up
    attention_levels: tuple[Whole, ...] = (0, 1, 2)  # levels (0 = full size) with transformers
    transformer_depth: Count = 1  # blocks of attention in each transformer, the middle's too
    heads: Whole = 8  # heads on each level; 0: the level's width / head_width
    head_width: Whole = 0  # width of a head on each level; 0: the level's width / heads
    context_width: Whole = 768  # of the text tower; 0: no cross-attention
    linear_projection: bool = False  # SD v2: the transformer's in and out projections are linear, not 1x1 convolutions
    time_embedding: str = "sinusoid"  # sinusoid, or fourier: random features
    time_injection: str = "add"  # add, or scale_shift: to the residual blocks' features
    classes: Whole = 0  # > 0: class-conditional, embedding table of classes + 1 rows (the last is the null class)
    vector_width: Whole = 0  # > 0: takes a vector (B, vector_width) beside t
    dropout: Decay = 0.0  # with it, how a batch is divided among processes and micro-batches changes the masks
    depths: tuple[Count, ...] = ()  # transformer_depth of each of attention_levels, where they differ (SDXL: 2, 10)
    kind: str = "unet"  # which network this is
    guidance_width: Whole = 0  # > 0: told its guidance scale, as so many sinusoids (LCM: 256), an even number


@dataclass(frozen=True)
class MMDiTConfig:
    """Noisy latent, t, context -> prediction, by a transformer. The defaults are Stable Diffusion 3 medium's."""

    kind: str = "mmdit"  # which network this is
    in_channels: Count = 16  # those of the latent
    out_channels: Count = 16  # the same
    patch: Count = 2  # side of a patch of the latent, which is one token
    width: Count = 1536  # of a token
    depth: Count = 24  # blocks
    heads: Count = 24  # of each attention, a divisor of the width
    streams: Count = 2  # 2: the context has weights of its own in each block; 1: it shares the image's
    context_width: Whole = 4096  # of the encoded text; 0: no context
    vector_width: Whole = 2048  # > 0: takes a vector (B, vector_width) beside t
    classes: Whole = 0  # > 0: class-conditional, embedding table of classes + 1 rows (the last is the null class)
    qk_norm: bool = False  # RMSNorm of queries and keys (3.5)
    second_attention: Whole = 0  # the first so many blocks have one over the image alone (3.5 medium: 13)
    grid: Count = 192  # side of the table of positions, in patches: the largest picture
    side: Count = 64  # patches along a side of the pictures trained on


@dataclass(frozen=True)
class EncoderConfig:
    """What a network is told beside the caption."""

    labels: tuple[str, ...] = ()  # names of the classes, in order; none: numbers from 0
    pooled: bool = False  # the vector begins with the features of the whole caption, of each tower that projects
    sizes: Whole = 0  # width of each of six sizes and crops in the vector (SDXL: 256); 0: they are not told
    score: bool = False  # the last of them is an aesthetic score in place of the target size (SDXL's refiner)
    width: Whole = 0  # of the context, filled up with zeros (SD 3: 4096); 0: as wide as the towers together
    t5_tokens: Whole = 0  # of T5 behind the others along the context, zeros where there is no T5 (SD 3: 77)
    empty: str = "encoded"  # what an empty text is told as: encoded like any other, or zeros (SDXL's base)


@dataclass(frozen=True)
class ScheduleConfig:
    """The law t <-> sigma of the training noise. The defaults are Stable Diffusion's."""

    kind: str = "scaled_linear"  # chains: linear, scaled_linear (in sqrt(beta)), cosine, sigmoid; or vp, ve, flow, edm
    steps: Annotated[int, Range(least=2)] = 1000  # trained levels; the others are trained between them too
    beta_start: Positive = 0.00085  # linear, scaled_linear
    beta_end: Positive = 0.012  # the same two
    zero_terminal_snr: bool = False  # rescale so that the last step is pure noise (Lin et al. 2024, algorithm 1)
    beta_min: NotNegative = 0.1  # vp: beta of the continuous chain at time 0 and 1 (Song et al. 2021, appendix C)
    beta_max: Positive = 20.0  # vp
    time_min: Positive = 1e-3  # vp: the first trained time
    sigma_min: Positive = 0.002  # ve, edm: its ends (Karras et al. 2022; Song et al. 2021 have 0.01 and 50)
    sigma_max: Positive = 80.0  # ve, edm (CosXL: 120)
    shift: Positive = 1.0  # flow: times every sigma of a grid and of the level draw (SD 3: 3.0 at 1024 pixels)


@dataclass(frozen=True)
class DiffusionLossConfig:
    """Stage two: w(sigma) |D - x0|^2 with sigma drawn by a law of its own."""

    weight: str = "uniform"  # uniform (on the network's own target), snr, min_snr, truncated, edm, elbo
    min_snr_gamma: Positive = 5.0  # of weight min_snr
    levels: str = "uniform"  # uniform in t, lognormal in sigma, logit_normal in rectified flow's t
    level_mean: float | None = None  # of ln sigma = logit t; none: lognormal -1.2 (EDM), logit_normal 0 (SD 3)
    level_std: Positive | None = None  # none: lognormal 1.2, logit_normal 1
    stratified: bool = False  # each of the global batch's equal shares of probability gives one level
    variance_bound: NotNegative = 0.001  # weight of the bound that trains a learned variance
    offset_noise: NotNegative = 0.0  # deviation of a constant added to each channel's noise; 0.1 is usual
    input_perturbation: NotNegative = 0.0  # deviation of noise that the input has beyond the target's; 0.1 is usual
    caption_dropout: Share = 0.1  # share of samples trained on the encoded empty prompt
    lowest: Annotated[float, Range(least=0.001, most=1)] = 1.0  # share of the levels, the lowest: 0.2 of SDXL's refiner
    tower_dropout: Share = 0.0  # of each text tower by itself: share of samples in which zeros stand for what it says


@dataclass(frozen=True)
class DrawingConfig:
    """How a model is meant to be drawn, where nobody says otherwise. The defaults are those of a diffusion model."""

    cfg: float = 7.5  # guidance scale
    steps: Steps = 20  # of the sampler
    sampler: str = "dpmpp_2m"  # its name
    spacing: str = ""  # of the levels, a grid's name; empty: the sampler's own


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint is. A part that is None is not in it (a stage-one checkpoint has an autoencoder alone)."""

    autoencoder: AutoencoderConfig | None = None  # picture <-> latent
    text: TextConfig | None = None  # prompt -> context
    unet: UNetConfig | MMDiTConfig | None = None  # noisy latent, t, context -> prediction
    schedule: ScheduleConfig | None = None  # its noise
    parameterization: str = "eps"  # eps, x0, v, flow (n - x0), score, edm
    sigma_data: Positive = 1.0  # the data's deviation, for edm; latents have 1, pixels about 0.5
    learned_variance: bool = False  # the U-Net's second half of channels says the reverse steps' variance
    image_size: Side = 512  # pixels, the side it was trained at
    loss: DiffusionLossConfig | None = None  # what the U-Net was trained by; training that goes on from it reads this
    encoder: EncoderConfig = EncoderConfig()  # what the network is told beside the caption
    text_2: TextConfig | None = None  # a second tower, whose context stands beside the first one's
    t5: T5Config | None = None  # a third reader of captions, whose context stands behind the towers'
    drawing: DrawingConfig = DrawingConfig()  # how it is meant to be drawn

    @property
    def towers(self) -> dict[str, TextConfig]:
        """The text towers that there are, CLIP's, by the names of their parts, in order."""
        named = {name: getattr(self, name) for name in TOWERS}
        return {name: tower for name, tower in named.items() if tower is not None}

    @property
    def readers(self) -> dict[str, TextConfig | T5Config]:
        """The same, and T5 behind them."""
        return {**self.towers, **({} if self.t5 is None else {"t5": self.t5})}

    @property
    def takes_text(self) -> bool:
        """Whether the model has, or should have, a text tower: not where its network takes no captions."""
        return self.text is not None or self.unet is None or self.unet.context_width > 0

    @property
    def told_guidance(self) -> bool:
        """Whether the network is told its guidance scale, and is guided in one evaluation."""
        return isinstance(self.unet, UNetConfig) and self.unet.guidance_width > 0
