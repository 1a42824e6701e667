"""Every setting there is, as frozen dataclasses; YAML and `key=value` words are merged over them (settings.py).

Three groups: what a model *is* (it travels inside the checkpoint), where data comes from, and how a run trains. A
field's type says its range (ranges.py), and the comment on its line is what `--help` says of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ldm.ranges import (
    Count,
    Counts,
    Decay,
    Few,
    Filled,
    NotNegative,
    OneOf,
    Positive,
    Range,
    Seed,
    Share,
    Side,
    Texts,
    Whole,
)
from ldm.settings import changed, from_dict, load, to_dict  # noqa: F401 (how what follows is read and written)

Crop = Annotated[str, OneOf("center", "random")]
Caption = Annotated[str, OneOf("txt", "variants")]
Law = Annotated[str, OneOf("constant", "cosine")]
Precision = Annotated[str, OneOf("auto", "fp32", "bf16", "fp16")]
Tracker = Annotated[str, OneOf("tensorboard", "wandb")]
Width = Annotated[float, Range(least=0.001, most=0.2886)]  # an even average has 12 ** -0.5


# ---------------------------------------------------------------- what a model is


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
    layer: str = "last"  # last or penultimate block; the final LayerNorm follows either
    padding: str = "zero"  # zero (OpenCLIP, SD v2) or eot (Hugging Face, SD v1)
    cleaning: str = "open_clip"  # of prompts: open_clip (ftfy, HTML entities), or plain, as Hugging Face's tokenizer


@dataclass(frozen=True)
class UNetConfig:
    """Noisy latent, t, context -> prediction. The defaults are Stable Diffusion v1's."""

    in_channels: Count = 4  # those of the latent
    out_channels: Count = 4  # the same, or twice as many with learned_variance
    channels: Count = 320  # of the finest level, even
    multipliers: Counts = (1, 2, 4, 4)  # of channels on each level; a level is half the size of the one before
    blocks: Count = 2  # residual blocks on each level down; one more up
    attention_levels: tuple[Whole, ...] = (0, 1, 2)  # levels (0 = full size) with transformers
    transformer_depth: Count = 1  # blocks of attention in each transformer
    heads: Whole = 8  # heads on each level; 0: the level's width / head_width
    head_width: Whole = 0  # width of a head on each level; 0: the level's width / heads
    context_width: Whole = 768  # of the text tower; 0: no cross-attention
    linear_projection: bool = False  # SD v2: the transformer's in and out projections are linear, not 1x1 convolutions
    time_embedding: str = "sinusoid"  # sinusoid, or fourier: random features
    time_injection: str = "add"  # add, or scale_shift: to the residual blocks' features
    classes: Whole = 0  # > 0: class-conditional, embedding table of classes + 1 rows (the last is the null class)
    vector_width: Whole = 0  # > 0: takes a vector (B, vector_width) beside t
    dropout: Decay = 0.0  # with it, how a batch is divided among processes and micro-batches changes the masks


@dataclass(frozen=True)
class EncoderConfig:
    """What a network is told beside the caption."""

    labels: tuple[str, ...] = ()  # names of the classes, in order; none: numbers from 0
    pooled: bool = False  # the vector begins with the text tower's feature of the whole caption
    sizes: Whole = 0  # width of each of six sizes and crops in the vector (SDXL: 256); 0: they are not told


@dataclass(frozen=True)
class ScheduleConfig:
    """The law t <-> sigma of the training noise. The defaults are Stable Diffusion's."""

    kind: str = "scaled_linear"  # chains: linear, scaled_linear (in sqrt(beta)), cosine, sigmoid; or vp, ve, flow
    steps: Annotated[int, Range(least=2)] = 1000  # trained levels; vp, ve and flow are trained between them too
    beta_start: Positive = 0.00085  # linear, scaled_linear
    beta_end: Positive = 0.012  # the same two
    zero_terminal_snr: bool = False  # rescale so that the last step is pure noise (Lin et al. 2024, algorithm 1)
    beta_min: NotNegative = 0.1  # vp: beta of the continuous chain at time 0 and 1 (Song et al. 2021, appendix C)
    beta_max: Positive = 20.0  # vp
    time_min: Positive = 1e-3  # vp: the first trained time
    sigma_min: Positive = 0.002  # ve: its ends (Karras et al. 2022; Song et al. 2021 have 0.01 and 50)
    sigma_max: Positive = 80.0  # ve


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint is. A part that is None is not in it (a stage-one checkpoint has an autoencoder alone)."""

    autoencoder: AutoencoderConfig | None = None  # picture <-> latent
    text: TextConfig | None = None  # prompt -> context
    unet: UNetConfig | None = None  # noisy latent, t, context -> prediction
    schedule: ScheduleConfig | None = None  # its noise
    parameterization: str = "eps"  # eps, x0, v, flow (n - x0), score, edm
    sigma_data: Positive = 1.0  # the data's deviation, for edm; latents have 1, pixels about 0.5
    learned_variance: bool = False  # the U-Net's second half of channels says the reverse steps' variance
    image_size: Side = 512  # pixels, the side it was trained at
    loss: DiffusionLossConfig | None = None  # what the U-Net was trained by; training that goes on from it reads this
    encoder: EncoderConfig = EncoderConfig()  # what the network is told beside the caption

    @property
    def takes_text(self) -> bool:
        """Whether the model has, or should have, a text tower: not where its network takes no captions."""
        return self.text is not None or self.unet is None or self.unet.context_width > 0


# ---------------------------------------------------------------- where data comes from


@dataclass(frozen=True)
class DataConfig:
    """Shards and how a picture is prepared."""

    shards: str = ""  # files, URLs, commands (ldm/data/sources.py); several separated by commas or white space
    mixture: dict[str, Positive] = field(default_factory=dict)  # in place of `shards`: shards -> share of the samples
    validation: str = ""  # shards of held-out samples; empty: none
    size: Side = 64  # pixels; the shorter side is resized to it, then a square is cropped
    crop: Crop = "center"  # center, random
    flip: bool = False  # mirror half of the pictures
    buckets: Whole = 0  # > 0: pictures keep their shape; sides are multiples of it, about size x size pixels in all
    bucket_aspect: Annotated[float, Range(least=1)] = 2.0  # longer side / shorter side of a bucket, at most
    where: dict[str, list[str]] = field(default_factory=dict)  # keep samples whose json field is one of these
    label: str = ""  # the field of a sample's json that says its class; empty: none
    caption: Caption = "txt"  # txt, or variants: one of json["captions"], drawn anew each epoch
    streams: Count = 8  # virtual streams; global batch % streams == 0, streams % (processes * workers) == 0
    shuffle: Whole = 1000  # samples in the shuffle buffers of all streams together; 0 keeps the order
    workers: Few = 1  # reader processes for each training process; 0 reads in the training process
    bad_limit: Share = 0.1  # share of samples or shards that cannot be used, above which the run stops
    allow_pipe: bool = False  # run the commands (pipe:...) that `shards` names
    cache: str = ""  # folder for copies of remote shards; empty: ~/.cache/ldm/shards
    cache_gb: Positive = 50.0  # 10^9 bytes that they take, at most


# ---------------------------------------------------------------- how a run trains


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the rate is the one written, whatever the batch, the accumulation or the processes."""

    rate: Positive = 1e-4  # learning rate
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # decays of the first and second moment
    weight_decay: NotNegative = 0.0  # of matrices, not of biases and norms
    warmup: Whole = 0  # optimizer steps in which the rate rises from 0
    law: Law = "constant"  # constant, cosine (to `final_rate` at the last step)
    final_rate: NotNegative = 0.0  # where the cosine ends
    clip: NotNegative = 1.0  # gradient norm; 0 does not clip


@dataclass(frozen=True)
class LoopConfig:
    """What both stages have in common. Everything counts optimizer steps."""

    steps: Count = 1000  # of the whole run
    global_batch: Count = 32  # samples of one optimizer step over all processes
    micro_batch: Whole = 0  # samples of one forward pass; 0: global batch / processes
    precision: Precision = "auto"  # fp32, bf16, fp16; auto: bf16 on a GPU that computes in it, else fp32
    seed: Seed = 0  # of weights, order, noise and pictures
    ema: Decay = 0.999  # decay of the averaged weights, warmed up as (1 + n) / (10 + n); 0: none
    ema_on_cpu: bool = False  # the averages in the CPU's memory
    ema_widths: tuple[Width, ...] = ()  # sigma_rel of power-function averages, as [0.05, 0.1]; docs/training.md
    ema_snapshot_every: Count = 1000  # optimizer steps between snapshots of these
    log_every: Count = 20  # steps between lines of the log; the first has one too
    validate_every: Count = 500  # steps between figures on data.validation
    sample_every: Whole = 0  # steps between grids of pictures; 0: at the end only
    save_every: Count = 500  # steps between saved states
    keep: Count = 2  # states, the newest ones
    keep_every: Whole = 0  # states at multiples of it are kept for ever; 0: none
    bad_steps: Count = 10  # skipped in a row, for a loss or gradient that is not finite, before the run gives up
    max_minutes: NotNegative = 0.0  # since the process began; 0: no limit; else save and stop when it has passed
    compile: bool = False  # by torch.compile
    threads: Few = 0  # CPU threads of each process; 0: the cores divided by the processes (launchers set 1)
    trackers: tuple[Tracker, ...] = ()  # tensorboard, wandb (extra `track`)


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Stage one: L1 + perceptual + KL + PatchGAN. A weight of 0 leaves the term out."""

    l1: NotNegative = 1.0  # of the values
    gradient: NotNegative = 0.0  # L1 of horizontal and vertical differences: keeps edges crisp at small cost
    perceptual: NotNegative = 1.0  # distance of a trained network's features
    perceptual_net: str = "efficientnet-lite0"  # or lpips (downloads its backbone)
    kl: NotNegative = 1e-6  # of the KL summed over a latent, divided by the picture's values
    adversarial: NotNegative = 0.0  # of the discriminator, relative to the rest
    adversarial_start: Whole = 0  # step at which the discriminator begins
    adversarial_ramp: Whole = 1000  # steps until the adversarial weight is whole
    adaptive_max: Positive = 1e4  # clamp of |grad reconstruction| / |grad adversarial|
    discriminator_channels: Count = 64  # of its first layer, a multiple of 4
    discriminator_layers: Count = 3  # halvings
    discriminator_rate: Positive = 1e-4  # learning rate
    guard: NotNegative = 1.5  # reconstruction this many times its best: back, half the adversarial weight; 0: never


@dataclass(frozen=True)
class AutoencoderTraining:
    """scripts/train_autoencoder.py"""

    output: str = ""  # folder of the run: states, log, pictures, and at the end the model
    resume: str = ""  # auto: go on from `output` if something is there
    model: AutoencoderConfig = AutoencoderConfig()
    data: DataConfig = DataConfig()
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()
    scale_samples: Count = 2048  # pictures over which the latents' shift and scale are measured at the end


@dataclass(frozen=True)
class ImageTowerConfig:
    """The picture side of our own CLIP: a ViT that is trained along and not shipped."""

    size: Count = 64  # pixels, as data.size
    patch: Count = 8  # pixels of a patch's side
    width: Count = 192  # of its features
    layers: Count = 6  # blocks of attention and MLP
    heads: Count = 6  # divisors of the width


@dataclass(frozen=True)
class ClipTraining:
    """scripts/train_clip.py"""

    output: str = ""  # folder of the run: states, log, pictures, and at the end the model
    resume: str = ""  # auto: go on from `output` if something is there
    model: TextConfig = TextConfig(context_length=32, width=192, heads=6, layers=6, embed_dim=192)
    image_tower: ImageTowerConfig = ImageTowerConfig()
    data: DataConfig = DataConfig(caption="variants")
    optimizer: OptimizerConfig = OptimizerConfig(rate=5e-4, weight_decay=0.1, warmup=100, law="cosine")
    loop: LoopConfig = LoopConfig(global_batch=128)


@dataclass(frozen=True)
class DiffusionLossConfig:
    """Stage two: w(sigma) |D - x0|^2 with sigma drawn by a law of its own."""

    weight: str = "uniform"  # uniform (on the network's own target), snr, min_snr, edm, elbo
    min_snr_gamma: Positive = 5.0  # of weight min_snr
    levels: str = "uniform"  # uniform in t, lognormal in sigma, logit_normal in rectified flow's t
    level_mean: float | None = None  # of ln sigma = logit t; none: lognormal -1.2 (EDM), logit_normal 0 (SD 3)
    level_std: Positive | None = None  # none: lognormal 1.2, logit_normal 1
    stratified: bool = False  # each of the global batch's equal shares of probability gives one level
    variance_bound: NotNegative = 0.001  # weight of the bound that trains a learned variance
    offset_noise: NotNegative = 0.0  # deviation of a constant added to each channel's noise; 0.1 is usual
    input_perturbation: NotNegative = 0.0  # deviation of noise that the input has beyond the target's; 0.1 is usual
    caption_dropout: Share = 0.1  # share of samples trained on the encoded empty prompt


@dataclass(frozen=True)
class SampleConfig:
    """The grids a run draws while it trains, from EMA weights."""

    prompts: tuple[str, ...] = ()  # a picture each; empty: none
    cfg: float = 5.0  # guidance scale
    steps: Count = 30  # of ddim


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank changes of the U-Net of `init` in place of all its weights (Hu et al. 2021)."""

    rank: Whole = 0  # 0: train the weights themselves
    alpha: NotNegative = 0.0  # the change is alpha / rank times the two matrices' product; 0: the rank
    layers: str = "attention"  # of the attentions; transformer: all in the spatial transformers; all: all


@dataclass(frozen=True)
class FiguresConfig:
    """What scripts/evaluate.py measures, on few pictures, at each validation of a run."""

    pictures: Whole = 0  # drawn with sample.cfg and sample.steps; 0: nothing is measured
    reference: str = ""  # shards of real pictures, which lend their captions; empty: data.validation
    space: str = "efficientnet-lite0"  # of features, as scripts/evaluate.py takes it


@dataclass(frozen=True)
class DiffusionTraining:
    """scripts/train_diffusion.py"""

    output: str = ""  # folder of the run: states, log, pictures, and at the end the model
    resume: str = ""  # auto: go on from `output` if something is there
    init: str = ""  # a model to go on from: it says what `model`, `schedule` and the target are
    init_set: tuple[str, ...] = ()  # what it does not say of itself, as --set of txt2img: [parameterization=eps]
    lora: LoraConfig = LoraConfig()
    autoencoder: str = ""  # a model whose autoencoder is taken, as of train_autoencoder.py; empty: the identity codec
    text: str = ""  # a model whose text tower is taken, as of train_clip.py
    latents: str = ""  # shards that tools/precompute_latents.py wrote; empty: encode data.shards on the fly
    model: UNetConfig = UNetConfig()
    encoder: EncoderConfig = EncoderConfig()  # what the network is told beside the caption
    schedule: ScheduleConfig = ScheduleConfig()
    parameterization: str = ""  # eps, x0, v, flow, score, edm; empty: that of init, else v
    sigma_data: Positive = 1.0  # the data's deviation, for edm; latents have 1, pixels about 0.5
    learned_variance: bool = False  # model.out_channels is then twice model.in_channels
    data: DataConfig = DataConfig()
    loss: DiffusionLossConfig = DiffusionLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()
    sample: SampleConfig = SampleConfig()
    figures: FiguresConfig = FiguresConfig()
    gradient_checkpointing: bool = False  # less memory for about a third more time
    attention: str = "sdpa"  # torch's own, or xformers (extra `xformers`, CUDA alone); no part of the model


@dataclass(frozen=True)
class EmbeddingTraining:
    """scripts/train_embedding.py: a new word for the text tower of `init`, from pictures of what it means."""

    output: str = ""  # folder of the run: states, log, pictures, and at the end the model
    resume: str = ""  # auto: go on from `output` if something is there
    init: str = "icons"  # a model to whose text tower the word is added
    init_set: tuple[str, ...] = ()  # what it does not say of itself, as --set of txt2img: [parameterization=eps]
    word: str = "<new>"  # as prompts will have it
    vectors: Count = 1  # places of the context that the word takes
    begin_with: str = "picture"  # a word that is known: the vectors begin as its own
    templates: Texts = ("{}", "a picture of {}", "a drawing of {}", "one {}", "a large {}", "a small {}")  # {}: word
    data: DataConfig = DataConfig()  # the pictures' own captions are not used
    loss: DiffusionLossConfig = DiffusionLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig(rate=5e-3)
    loop: LoopConfig = LoopConfig(global_batch=8, ema=0.0)
    sample: SampleConfig = SampleConfig()
