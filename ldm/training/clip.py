"""Our own CLIP: a text and a picture tower trained to recognise which caption belongs to which picture.

The text tower then conditions the diffusion model. Loss and towers are open_clip's; the script is ours and not
`open_clip_train`, for two reasons. CLIP becomes a stage like the others: same shards, order, resume, plan, EMA and
log, no second data pipeline to trust. And the embedding table holds rows for the words of the training captions
alone, 6 thousand of CLIP's 49, which that trainer has no notion of.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.checkpoints import native
from ldm.checkpoints.limits import check_size
from ldm.conditioning.clip import END, PADDING, START, VOCABULARY, TextTower, clip_tokenizer
from ldm.conditioning.image_tower import ImageTower, save_image_tower
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.config import ClipTraining, DataConfig, ImageTowerConfig, ModelConfig, TextConfig, to_dict
from ldm.data import samples
from ldm.data.loader import Batch, Loader, validation_batches
from ldm.data.records import BadSample, Tally
from ldm.data.shards import ShardReader, check_share, open_data
from ldm.errors import UserError
from ldm.training.draws import Draws
from ldm.training.preflight import check_settings, check_untold, check_validation
from ldm.training.processes import divide
from ldm.training.stage import Batches, Judge, Player

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5
CANDIDATES = 256  # captions a held-out picture's own is sought among, and the other way round
# Share of the captions' pieces that are shown as the unknown word. The row that all tokens without one share would
# otherwise never be trained, and a prompt with a new word would meet random numbers.
UNKNOWN_SHARE = 0.02


class ClipTowers(nn.Module):
    """Both towers and the temperature, as one forward pass: what gradient synchronisation hooks into."""

    def __init__(self, text: TextConfig, image: ImageTowerConfig) -> None:
        super().__init__()
        self.text = TextTower(text)
        self.image = ImageTower(image, self.text.config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image (B, 3, H, W), tokens (B, L) -> unit vectors (B, E) of the pictures, of the captions; scale ()."""
        # On a CPU the fused attention kernel is the slower one at these lengths: 59 against 42 samples a second and
        # core in bfloat16 with 65 patch tokens, 152 against 96 with 17; equal in float32.
        plain = image.device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            pictures, captions = self.image(image), self.text.features(tokens)
        return F.normalize(pictures.float(), dim=-1), F.normalize(captions.float(), dim=-1), self.logit_scale.exp()


class ClipStage:
    """The training of `config` on this process' share of the data.

    Every caption is told from all others of the global batch, over all processes; hence accumulation, which would
    compare within micro-batches only, is refused.

    said: the dotted names of the settings that were written out; what `model.arch` contradicts is refused.
    """

    def __init__(
        self, config: ClipTraining, rank: int, world: int, device: torch.device, said: Collection[str] = ()
    ) -> None:
        check_settings(config, world)
        check_untold(config.data)
        if config.data.caption == "none":
            raise UserError("CLIP is trained on captions; set data.caption to txt or variants")
        if config.image_tower.size != config.data.size:
            raise UserError(
                f"image_tower.size={config.image_tower.size} and data.size={config.data.size} must be the same"
            )
        if config.data.buckets:
            raise UserError("CLIP's picture tower reads squares of one size; leave data.buckets at 0")
        if divide(config.loop, world).accumulation != 1:
            raise UserError(
                "CLIP compares the whole batch, which accumulation would take apart; leave loop.micro_batch at 0, "
                "or lower loop.global_batch"
            )
        check_size(ModelConfig(text=config.model, image_size=config.data.size), "this run")
        with torch.device("meta"):  # what cannot be built is told before the pass over all captions
            text = ClipTowers(config.model, config.image_tower).text.config
        for name, value in to_dict(text).items():
            if f"model.{name}" in said and value != (own := getattr(config.model, name)):
                raise UserError(f"model.{name} is {own}, and that of {text.arch} is {value}; leave one of the two out")
        torch.manual_seed(config.loop.seed)
        self.config, self.device = config, device
        self.words: Words | None = None
        if not text.token_ids:
            self.words = used_words(config.data, text)
            text = dataclasses.replace(text, token_ids=self.words.token_ids)
        self.towers = ClipTowers(text, config.image_tower)
        self.unknown = _without_row(text.token_ids)
        self.players = {"clip": Player(self.towers, config.optimizer)}
        self.judge: Judge | None = None
        self.batches: Batches = Loader(config.data, config.loop.global_batch, rank, world, config.loop.seed)
        if rank == 0:
            check_validation(config.data)
        declare_missing_operators()
        from open_clip.loss import ClipLoss

        # With these two settings the mean of the processes' gradients is the gradient of the whole batch's loss.
        self.contrast = ClipLoss(local_loss=False, gather_with_grad=True, rank=rank, world_size=world)

    def describe(self) -> list[str]:
        text, image = self.towers.text.config, self.config.image_tower
        patches = (image.size // image.patch) ** 2
        words = f"{len(text.token_ids):,} of {VOCABULARY:,} tokens own a row"
        if self.words is not None:
            words += f"; {self.words.cut:,} of {self.words.captions:,} captions are cut at {text.context_length}"
        return [
            f"towers      text {text.layers} layers of {text.width}, pictures {image.layers} layers of {image.width} "
            f"on {patches} patches, joint space {text.embed_dim}",
            f"words       {words}",
        ]

    def losses(
        self, batch: Batch, draws: Draws, step: int, networks: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        with torch.no_grad():
            self.towers.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        tokens, _ = self.towers.text.tokenize(batch.caption)
        tokens = self._hide_words(tokens, draws).to(self.device)
        pictures, captions, scale = networks["clip"](batch.image.to(self.device), tokens)
        loss = self.contrast(pictures, captions, scale)
        yield "clip", loss, {"loss": loss, "logit_scale": scale}

    def validate(self) -> dict[str, float]:
        """Retrieval on held-out samples, both ways, and the loss, each among 256 candidates (see `retrieval`)."""
        figures: list[dict[str, float]] = []
        for batch in validation_batches(self.config.data, CANDIDATES):
            if len(batch) < CANDIDATES and figures:
                break  # among fewer candidates the task is easier, and the mean would no longer say what it says
            tokens, _ = self.towers.text.tokenize(batch.caption)
            pictures, captions, scale = self.towers(batch.image.to(self.device), tokens.to(self.device))
            logits = scale * pictures @ captions.T
            own = torch.arange(len(batch), device=self.device)
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
            figures.append({"loss": float(loss), **retrieval(logits.cpu(), batch.caption)})
        names = figures[0] if figures else {}
        return {f"validation/{name}": sum(f[name] for f in figures) / len(figures) for name in names}

    def draw(self, output: Path, step: int) -> None:
        """Nothing: this stage makes no pictures."""

    def export(self, output: Path, finished: bool) -> None:
        """The text tower as a native checkpoint, and the picture tower beside it."""
        config = ModelConfig(text=self.towers.text.config, image_size=self.config.data.size)
        native.save(output, config, {"text": self.towers.text})
        save_image_tower(output, self.towers.image, float(self.towers.logit_scale.exp()))

    def _hide_words(self, tokens: Tensor, draws: Draws) -> Tensor:
        """A few of the words' pieces, drawn for each sample, become the unknown word; tokens (B, L) on the CPU."""
        if self.unknown is None:
            return tokens
        hidden = draws.normal("unknown words", tokens.shape[1:]).cpu() > NormalDist().inv_cdf(1 - UNKNOWN_SHARE)
        before_end = (tokens == END).cumsum(1) == 0
        return torch.where(hidden & before_end & (tokens != START), self.unknown, tokens)


def retrieval(similarity: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """How often a sample's partner is among the best 1 and 5 of N candidates, in both directions.

    Args:
        similarity: (N, N), row i picture i, column j caption j.
        captions: N; another sample with the same words counts neither for nor against. Ties count against, so that
            a collapsed model scores 0.
    """
    same = torch.tensor([[a == b for b in captions] for a in captions])
    figures = {}
    for name, scores in (("picture_to_caption", similarity), ("caption_to_picture", similarity.T)):
        better = (scores >= scores.diagonal().unsqueeze(1)) & ~same
        rank = better.sum(1)
        for k in (1, 5):
            figures[f"{name}_top{k}"] = float((rank < k).double().mean())
    return figures


# ---------------------------------------------------------------- which tokens own a row


@dataclass(frozen=True)
class Words:
    """What a pass over the training captions found."""

    token_ids: tuple[int, ...]  # sorted; start, end and padding are always among them
    captions: int  # different ones
    cut: int  # of these, longer than the tower reads


def used_words(data: DataConfig, text: TextConfig) -> Words:
    """The tokens of all captions that training may show: of the sets' samples that `data.where` keeps.

    With `data.caption` "variants" that is the json's variants and the .txt, else the .txt alone. A function of the
    set of captions: the order of shards and the number of processes do not matter. Raises UserError where the loader
    would. A sample that the loader leaves out (its picture does not decode) may add tokens, which does no harm; one
    that cannot be read adds none, and its words share a row should it come back.
    """
    opened, tally = open_data(data, samples.fault), Tally()
    captions: set[str] = set()
    with ShardReader(opened.shards, opened.store) as reader:
        for shard, index in enumerate(opened.shards):
            for number in range(len(index)):
                try:
                    meta = _object(reader.member(shard, number, "json"))
                    plain = reader.member(shard, number, "txt")
                except BadSample as error:
                    tally.note(str(error), index.key(number), index.path)
                    continue
                captions.update(_captions(meta, plain, data.caption))
    check_share(tally, len(opened), data.bad_limit)
    tokenizer = clip_tokenizer()
    used = {START, END, PADDING[text.padding]}
    cut = 0
    for caption in captions:
        pieces = tokenizer.encode(caption)
        cut += len(pieces) > text.context_length - 2
        used.update(pieces[: text.context_length - 2])
    return Words(tuple(sorted(used)), len(captions), cut)


def _captions(meta: dict[str, Any], plain: bytes | None, caption: str) -> Iterator[str]:
    """What training may show of a sample with this json and .txt."""
    found = [meta.get("caption") if plain is None else plain.decode("utf-8-sig", "replace")]
    if caption == "variants" and isinstance(meta.get("captions"), list):
        found += meta["captions"]
    yield from (text.strip() for text in found if isinstance(text, str))


def _object(content: bytes | None) -> dict[str, Any]:
    """A sample's json; empty where there is none that can be read."""
    try:
        found = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _without_row(token_ids: tuple[int, ...]) -> int | None:
    """A token that stands for the unknown word: the first that owns no row; None if all do."""
    owners = set(token_ids)
    return next((token for token in range(VOCABULARY) if token not in owners), None)
