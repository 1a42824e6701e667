"""Textual inversion (Gal et al. 2022): the vectors of one new word are trained, and nothing else.

The objective is stage two's, on captions made of templates with the word in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.adapters.textual_inversion import Embedding, TowerWithWords
from ldm.api import assemble
from ldm.checkpoints.adapter_words import training_words
from ldm.checkpoints.textual_inversion import save_embedding
from ldm.conditioning.clip import TextTower
from ldm.conditioning.encoder import Encoder
from ldm.config import DiffusionLossConfig, EmbeddingTraining
from ldm.data.loader import Loader, PictureDecode
from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.training.begin import Beginning, begin_from
from ldm.training.diffusion import Course, DiffusionStage, Trained
from ldm.training.fitting import check_fits
from ldm.training.inputs import Inputs
from ldm.training.objectives import regress
from ldm.training.preflight import check_settings


class Word(nn.Module):
    """Tokens (B, L) of each tower -> context and pooled text, through a frozen encoder; only the word is trained."""

    def __init__(self, encoder: Encoder, vectors: nn.Parameter, second: nn.Parameter | None):
        super().__init__()
        self._encoder = [encoder]  # in a list: not a submodule
        self.vectors = vectors.requires_grad_(True)
        self.second = None if second is None else second.requires_grad_(True)  # of a second tower

    def forward(self, tokens: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        return self._encoder[0].of_tokens(tokens)


def embedding_stage(
    config: EmbeddingTraining, rank: int, world: int, device: torch.device, said: Collection[str] = ()
) -> DiffusionStage:
    """The training of a new word of a model, on this process' share of the data; `said` as for `diffusion_stage`."""
    check_settings(config, world)
    if not config.init:
        raise UserError("a new word is for a model that is there; name it with init=PATH (or init=icons)")
    if not all(template.count("{}") == 1 for template in config.templates):
        raise UserError("each of templates has {} once, where the word goes, such as 'a picture of {}'")
    if config.loss.caption_dropout not in (0, DiffusionLossConfig().caption_dropout):
        raise UserError("loss.caption_dropout would drop the word that is to be learned; leave it out")
    began = begin_from(config, device, said)
    takes = check_fits(began, config.data)
    if began.config.told_guidance:
        raise UserError(
            f"the model {config.init} is told its guidance scale, and a word is trained without; choose another"
        )
    text = began.towers.get("text")
    if not isinstance(text, TextTower) or began.unet is None or began.config.loss is None:
        raise UserError(f"the model {config.init} reads no text, so no word can be added; choose another one")
    room = text.config.context_length - 2
    if config.vectors > room:
        raise UserError(f"vectors is {config.vectors}, and a prompt has room for 1 to {room}")
    towers: dict[str, TowerWithWords] = {}
    for name, tower in began.towers.items():
        if isinstance(tower, TextTower):  # T5 reads it as it stands
            new = Embedding(config.word, _first_vectors(config, tower), "the setting word")
            towers[name] = TowerWithWords(tower, [new]).to(device).requires_grad_(False).eval()
    network = began.unet.requires_grad_(False).eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = assemble(began.config, began.codec, {**began.towers, **towers}, network)
    # A caption without the word teaches it nothing. The rest of the loss may be that of the model itself.
    loss = dataclasses.replace(began.config.loss, caption_dropout=0.0, tower_dropout=0.0)
    captions = tuple(template.replace("{}", config.word) for template in config.templates)
    sample = dataclasses.replace(config.sample, prompts=config.sample.prompts or captions)  # what it is trained on
    data = dataclasses.replace(config.data, validation="", caption="none")  # the pictures' own have not the word
    share = config.loop.global_batch, rank, world, config.loop.seed
    batches = partial(Loader, data, *share, PictureDecode(data, model.encoder.rows))
    unread = ("data.validation is not looked at: no caption there has the word",) if config.data.validation else ()
    course = Course(
        batches, data, config.loop, loss, sample, Settings(sample.cfg, sample.steps), notices=(*began.notices, *unread)
    )
    inputs = Inputs(model.codec, model.encoder, config.data.size, device, captions, takes=takes)
    vectors, *others = (tower.token_embedding.extra for tower in towers.values())
    second = others[0] if others else None
    trained = Trained(
        "word",
        Word(model.encoder, vectors, second),
        config.optimizer,
        partial(_export, dataclasses.replace(config, loss=loss), began, vectors, second),
        (f"word        {config.word}, {config.vectors} vectors, from '{config.begin_with}'",),
    )
    return DiffusionStage(model, inputs, regress(model.law, loss), trained, course, check=rank == 0)


def _export(
    config: EmbeddingTraining, began: Beginning, vectors: Tensor, second: Tensor | None, output: Path, finished: bool
) -> None:
    """The word, as a file that diffusers' load_textual_inversion reads too, tower by tower where there are two."""
    words = training_words("textual-inversion", config, began.sources["text"], finished)
    save_embedding(output / "embedding.safetensors", Embedding(config.word, vectors, second=second), words)


def _first_vectors(config: EmbeddingTraining, tower: TextTower) -> Tensor:
    """(vectors, D): those of the pieces of `begin_with`, again from the first where there are too few."""
    pieces = tower.tokenizer().encode(config.begin_with)
    if not pieces:
        raise UserError(f"begin_with is '{config.begin_with}', which has no piece that the tower knows; name a word")
    tokens = torch.tensor([pieces[i % len(pieces)] for i in range(config.vectors)])
    rows = tokens if tower.rows is None else tower.rows.cpu()[tokens]
    table = tower.token_embedding.weight
    return table[rows.to(table.device)].detach().clone()
