"""Textual inversion (Gal et al. 2022): the vectors of one new word are trained, and nothing else.

The loss is stage two's, on captions made of templates with the word in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.adapters.textual_inversion import Embedding, TowerWithWords
from ldm.checkpoints.adapter_words import training_words
from ldm.checkpoints.textual_inversion import save_embedding
from ldm.conditioning.clip import TextTower
from ldm.conditioning.condition import Condition
from ldm.config import DiffusionLossConfig, DiffusionTraining, EmbeddingTraining, SampleConfig
from ldm.data.loader import Batch
from ldm.errors import UserError
from ldm.training.draws import Draws
from ldm.training.preflight import check_settings
from ldm.training.stage import Batches, Player
from ldm.training.stage_two import DiffusionStage


class Word(nn.Module):
    """Tokens (B, L) -> context (B, L, D), through a frozen tower; the parameters are the new word's vectors alone."""

    def __init__(self, tower: TowerWithWords):
        super().__init__()
        self._tower = [tower]  # in a list: not a submodule
        self.vectors = tower.token_embedding.extra
        self.vectors.requires_grad_(True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self._tower[0](tokens)


class EmbeddingStage:
    """The training of `config` on this process' share of the data."""

    def __init__(self, config: EmbeddingTraining, rank: int, world: int, device: torch.device):
        check_settings(config, world)
        if not config.init:
            raise UserError("a new word is for a model that is there; name it with init=PATH (or init=icons)")
        if not all(template.count("{}") == 1 for template in config.templates):
            raise UserError("each of templates has {} once, where the word goes, such as 'a picture of {}'")
        if config.loss.caption_dropout not in (0, DiffusionLossConfig().caption_dropout):
            raise UserError("loss.caption_dropout would drop the word that is to be learned; leave it out")
        self.config = config
        inner = DiffusionTraining(
            init=config.init,
            init_set=config.init_set,
            data=dataclasses.replace(config.data, validation=""),
            loss=config.loss,
            loop=config.loop,
        )
        self.model = DiffusionStage(inner, rank, world, device)
        # A caption without the word teaches it nothing. The rest of the loss may be that of the model itself.
        loss = dataclasses.replace(self.model.config.loss, caption_dropout=0.0)
        self.model.config = dataclasses.replace(self.model.config, loss=loss, sample=_sample(config))
        self.model.unet.requires_grad_(False).eval()
        tower = self.model.text
        assert tower is not None  # init has one
        room = tower.config.context_length - 2
        if config.vectors > room:
            raise UserError(f"vectors is {config.vectors}, and a prompt has room for 1 to {room}")
        self.tower = TowerWithWords(
            tower, [Embedding(config.word, _first_vectors(config, tower), "the setting word")]
        ).to(device)
        self.tower.requires_grad_(False).eval()
        if config.data.validation:
            self.model.notices.append("data.validation is not looked at: no caption there has the word")
        self.model.encoder = self.model.encoder.with_text(self.tower)
        if rank == 0:
            self.model.check_end()
        self.players = {"word": Player(Word(self.tower), config.optimizer)}

    @property
    def batches(self) -> Batches:
        return self.model.batches

    def describe(self) -> list[str]:
        word = f"word        {self.config.word}, {self.config.vectors} vectors, from '{self.config.begin_with}'"
        return [*(line for line in self.model.describe() if not line.startswith("export ")), word]

    def losses(
        self, batch: Batch, draws: Draws, step: int, networks: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        model = self.model
        x0, _ = model._prepare(batch, draws)
        templates = self.config.templates
        captions = [templates[int(u * len(templates))] for u in draws.uniform("template").tolist()]
        tokens, _ = self.tower.tokenize([caption.replace("{}", self.config.word) for caption in captions])
        condition = Condition(networks["word"](tokens.to(model.device)))
        loss, logs = model.noised(model.unet, x0, condition, draws)
        yield "word", loss, logs

    def validate(self) -> dict[str, float]:
        """Nothing: held-out pictures have no captions with the word."""
        return {}

    def draw(self, output: Path, step: int) -> None:
        self.model.draw(output, step)

    def export(self, output: Path, finished: bool) -> None:
        """The word, as a file that diffusers' load_textual_inversion reads too."""
        vectors = self.tower.token_embedding.extra
        config = dataclasses.replace(self.config, loss=self.model.config.loss)
        words = training_words("textual-inversion", config, self.model.sources["text"], finished)
        save_embedding(output / "embedding.safetensors", Embedding(self.config.word, vectors), words)


def _sample(config: EmbeddingTraining) -> SampleConfig:
    """What the run draws: without prompts, what it is trained on."""
    prompts = config.sample.prompts or tuple(template.replace("{}", config.word) for template in config.templates)
    return dataclasses.replace(config.sample, prompts=prompts)


def _first_vectors(config: EmbeddingTraining, tower: TextTower) -> Tensor:
    """(vectors, D): those of the pieces of `begin_with`, again from the first where there are too few."""
    pieces = tower.tokenizer().encode(config.begin_with)
    if not pieces:
        raise UserError(f"begin_with is '{config.begin_with}', which has no piece that the tower knows; name a word")
    tokens = torch.tensor([pieces[i % len(pieces)] for i in range(config.vectors)])
    rows = tokens if tower.rows is None else tower.rows.cpu()[tokens]
    table = tower.token_embedding.weight
    return table[rows.to(table.device)].detach().clone()
