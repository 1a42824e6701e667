"""Every setting of a training, as frozen dataclasses; YAML and `key=value` words are merged over them (settings.py).

Three groups: what a model *is* (model_config.py), where data comes from, and how a run trains. A field's type says its
range (ranges.py), and the comment on its line is what `--help` says of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ldm.model_config import (  # noqa: F401 (what a model is, for those who read or write it with these settings)
    AutoencoderConfig,
    DiffusionLossConfig,
    DrawingConfig,
    EncoderConfig,
    MMDiTConfig,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
)
from ldm.ranges import Count, Decay, Few, NotNegative, OneOf, Positive, Range, Seed, Share, Side, Texts, Whole
from ldm.settings import changed, from_dict, load, to_dict  # noqa: F401 (how what follows is read and written)

Crop = Annotated[str, OneOf("center", "random")]
Caption = Annotated[str, OneOf("txt", "variants", "none")]
Law = Annotated[str, OneOf("constant", "cosine", "linear")]
Precision = Annotated[str, OneOf("auto", "fp32", "bf16", "fp16")]
Tracker = Annotated[str, OneOf("tensorboard", "wandb")]
Width = Annotated[float, Range(least=0.001, most=0.2886)]  # an even average has 12 ** -0.5


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
    score: str = ""  # the field of a sample's json that is its aesthetic score, of 10; empty: none
    depth: str = ""  # the member of a sample that is its depth map, by its name's end: grey, larger is nearer
    caption: Caption = "txt"  # txt; variants: one of json["captions"], drawn anew each epoch; none: pictures need none
    streams: Count = 8  # virtual streams; global batch % streams == 0, streams % (processes * workers) == 0
    shuffle: Whole = 1000  # samples in the shuffle buffers of all streams together; 0 keeps the order
    workers: Few = 1  # reader processes for each training process; 0 reads in the training process
    bad_limit: Share = 0.1  # share of samples or shards that cannot be used, above which the run stops
    allow_pipe: bool = False  # run the commands (pipe:...) that `shards` names
    cache: str = ""  # folder for copies of remote shards; empty: ~/.cache/ldm/shards
    cache_gb: Annotated[Positive, Range(most=1e9)] = 50.0  # 10^9 bytes that they take, at most


# ---------------------------------------------------------------- how a run trains


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the rate is the one written, whatever the batch, the accumulation or the processes."""

    rate: Positive = 1e-4  # learning rate
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # decays of the first and second moment
    weight_decay: NotNegative = 0.0  # of matrices, not of biases and norms
    warmup: Whole = 0  # optimizer steps in which the rate rises from 0
    law: Law = "constant"  # constant; cosine, linear: to `final_rate` at the last step
    final_rate: NotNegative = 0.0  # where these end
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
    shrunk: Share = 0.0  # share of steps in which a shrunk latent is to decode to the shrunk picture (EQ-VAE)
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
    init: str = ""  # a model whose autoencoder this begins with; empty: a new one of `model`
    decoder_only: bool = False  # leave the encoder of init, and so its latents, as they are
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
class SampleConfig:
    """The grids a run draws while it trains, from EMA weights."""

    prompts: tuple[str, ...] = ()  # a picture each; empty: none
    cfg: float = 5.0  # guidance scale; of an objective that saves steps: of a network that is told it
    steps: Count = 30  # of the sampler that draws unless another is asked for; one that saves steps has its own
    labels: tuple[str, ...] = ()  # of a network with classes: a picture each, without prompts or with a prompt each


@dataclass(frozen=True)
class Regress:
    """The network's own target at drawn levels: what a diffusion model is trained by."""

    kind: str = "regress"  # which objective this is


@dataclass(frozen=True)
class Halve:
    """Progressive distillation of the model of `init`: where its 2 N steps of DDIM lead, in N (Salimans, Ho 2022)."""

    kind: str = "halve"  # which objective this is
    steps: Count = 8  # N, of the student
    merged: Count = 2  # steps of the teacher that one of the student's stands for; 1: its guidance alone is taken in
    spacing: str = "trailing"  # of the grid that both walk
    cfg: float = 1.0  # guidance scale of the teacher, which the student then has at 1
    cfg_range: tuple[float, float] | None = None  # scales that the student is told, one drawn for each sample: [3, 13]


@dataclass(frozen=True)
class Consistency:
    """Consistency distillation of the model of `init`, latent or not (Song et al. 2023; Luo et al. 2023)."""

    kind: str = "consistency"  # which objective this is
    levels: Count = 50  # of the grid from pure noise to the picture
    skip: Count = 1  # levels that one step of the teacher goes down; of levels=1000 Luo et al. skip 20
    spacing: str = "trailing"  # of the grid
    solver: Annotated[str, OneOf("ddim", "heun")] = "ddim"  # the teacher's step
    cfg: float = 1.0  # guidance scale of the teacher, which the student then has at 1
    cfg_range: tuple[float, float] | None = None  # scales that the student is told, one drawn for each sample: [3, 13]
    steps: Count = 4  # in which the student is drawn


@dataclass(frozen=True)
class ConsistencyTraining:
    """A consistency model without a teacher (Song and Dhariwal 2023)."""

    kind: str = "consistency_training"  # which objective this is
    first_levels: Count = 10  # steps that the flow is cut into at first, doubled at equal distances
    last_levels: Count = 1280  # at the end
    spacing: str = "karras"  # of their grids
    steps: Count = 4  # in which it is drawn


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank changes of the U-Net of `init` in place of all its weights (Hu et al. 2021)."""

    rank: Whole = 0  # 0: train the weights themselves
    alpha: NotNegative = 0.0  # the change is alpha / rank times the two matrices' product; 0: the rank
    layers: str = "attention"  # of the attentions; transformer: all in the spatial transformers; all: all


@dataclass(frozen=True)
class FiguresConfig:
    """What scripts/evaluate.py measures, on few pictures, at each validation of a run."""

    pictures: Whole = 0  # drawn as the sample; 0: nothing is measured
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
    text: str = ""  # a model whose text towers are taken, as of train_clip.py
    text_2: str = ""  # another one, whose text tower stands beside that of `text`; both are read as SDXL's
    latents: str = ""  # shards that tools/precompute_latents.py wrote; empty: encode data.shards on the fly
    model: UNetConfig | MMDiTConfig = UNetConfig()
    encoder: EncoderConfig = EncoderConfig()  # what the network is told beside the caption
    schedule: ScheduleConfig = ScheduleConfig()
    parameterization: str = ""  # eps, x0, v, flow, score, edm; empty: that of init, else v
    sigma_data: Positive = 1.0  # the data's deviation, for edm; latents have 1, pixels about 0.5
    learned_variance: bool = False  # model.out_channels is then twice model.in_channels
    data: DataConfig = DataConfig()
    objective: Regress | Halve | Consistency | ConsistencyTraining = Regress()  # regress, or one that saves steps
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
