"""Encoder: what is asked for -> what the network is told, one way for sampling and for training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning import chunks
from ldm.conditioning.clip import TextTower
from ldm.conditioning.condition import Condition, cat
from ldm.conditioning.t5 import LONGEST, T5Tower, flat
from ldm.errors import UserError, printable
from ldm.jobs import Ask, grammar
from ldm.model_config import EncoderConfig

SHOWN_WORDS = 12  # of those unknown to a tower, in a notice
SHOWN_LABELS = 20
EMPTY = ("encoded", "zeros")  # what an empty text is told as
LONGEST_PERIOD = 10_000.0  # of the sizes' sinusoids, in pixels over 2 pi


@dataclass(frozen=True, eq=False)
class Texts:
    """Encoded texts, each part None where the model has none."""

    context: Tensor | None = None  # (B, L, D)
    pooled: Tensor | None = None  # (B, E)

    def expand(self, count: int) -> Texts:
        """One row, `count` times."""
        context = None if self.context is None else self.context.expand(count, -1, -1)
        return Texts(context, None if self.pooled is None else self.pooled.expand(count, -1))

    def only(self, keep: Tensor) -> Texts:
        """Zeros in the rows where `keep` (B,) is False."""
        rows = keep.to("cpu" if self.context is None else self.context.device)
        context = None if self.context is None else self.context * rows[:, None, None]
        return Texts(context, None if self.pooled is None else self.pooled * rows[:, None])


class Encoder(nn.Module):
    """Asks -> Condition.

    `towers`: those of the captions by name, of contexts equally long, which are joined by width, and behind them along
    the context "t5"; none for a network that takes no captions. `classes`: how many a class-conditional network knows;
    the label after the last is the null class. `config` has their names, and what the vector is made of. Raises
    UserError for settings that contradict each other.
    """

    def __init__(
        self, towers: Mapping[str, TextTower | T5Tower], config: EncoderConfig = EncoderConfig(), classes: int = 0
    ) -> None:
        super().__init__()
        self.towers, self.config, self.classes = nn.ModuleDict(towers), config, classes
        self._check()
        self.rows = {name: row for row, name in enumerate(config.labels or map(str, range(classes)))}

    def _check(self) -> None:
        config, classes, towers, t5 = self.config, self.classes, self.named_towers, self.t5
        names = len(config.labels)
        if names not in (0, classes):
            raise UserError(
                f"encoder.labels has {names} names and the network {classes} classes; set model.classes={names}, or "
                "leave out encoder.labels"
            )
        if not all(config.labels) or len(set(config.labels)) != names:
            raise UserError("encoder.labels has an empty name, or one name twice; give each class a name of its own")
        if config.pooled and not any(tower.config.embed_dim for tower in towers.values()):
            raise UserError("encoder.pooled needs a text tower with a projection (text.embed_dim above 0)")
        if config.empty not in EMPTY:
            raise UserError(f"encoder.empty is '{config.empty[:40]}'; choose one of {', '.join(EMPTY)}")
        if config.score and not config.sizes:
            raise UserError("encoder.score is told beside sizes, which encoder.sizes=0 leaves out; set encoder.sizes")
        widths = sum(tower.config.width for tower in towers.values())
        if config.width and config.width < widths:
            raise UserError(f"encoder.width is {config.width} and the text towers are {widths} wide together; set more")
        lengths = {tower.config.context_length for tower in towers.values()}
        if len(lengths) > 1:
            raise UserError(f"the text towers read {' and '.join(map(str, sorted(lengths)))} tokens; pair equal ones")
        if config.sizes % 2 or config.sizes < 0:
            raise UserError(
                f"encoder.sizes is {config.sizes}; choose an even number (half are cosines, half sines), or 0"
            )
        if t5 is not None and not (towers and config.t5_tokens and config.width == t5.config.width):
            raise UserError(
                f"T5 is {t5.config.width} wide and stands behind text towers: set encoder.width={t5.config.width} and "
                "encoder.t5_tokens (Stable Diffusion 3: 77), or leave T5 out: t5=null"
            )

    def with_towers(self, towers: Mapping[str, TextTower]) -> Encoder:
        """The same with other towers, as ones that know more words."""
        return Encoder({**self.readers, **towers}, self.config, self.classes)

    @property
    def readers(self) -> dict[str, TextTower | T5Tower]:
        """All that read captions by name, in order, T5 last."""
        return cast("dict[str, TextTower | T5Tower]", dict(self.towers.items()))

    @property
    def weights(self) -> dict[str, nn.Module | Mapping[str, Tensor]]:
        """The same as what is to be written of them: of a T5 whose numbers rest in a file, these as they are there."""
        return {name: getattr(tower, "stored", None) or tower for name, tower in self.readers.items()}

    @property
    def named_towers(self) -> dict[str, TextTower]:
        """The towers that are CLIP's by name, in order."""
        return {name: tower for name, tower in self.readers.items() if not isinstance(tower, T5Tower)}

    @property
    def t5(self) -> T5Tower | None:
        """None where there is none; zeros stand in its place where the network wants one."""
        return cast(T5Tower, self.towers["t5"]) if "t5" in self.towers else None

    @property
    def text(self) -> TextTower | None:
        """The first tower; None where there is none."""
        return next(iter(self.named_towers.values()), None)

    @property
    def context_width(self) -> int:
        """D, of the context that it makes; 0: none."""
        return self.config.width or sum(tower.config.width for tower in self.named_towers.values())

    @property
    def known(self) -> str:
        """The labels in words, for a message."""
        names = self.config.labels
        if not names:
            return f"0 to {self.classes - 1}"
        return ", ".join(names[:SHOWN_LABELS]) + (", ..." if len(names) > SHOWN_LABELS else "")

    @property
    def vector_width(self) -> int:
        """V, of the vector that it makes; 0: none."""
        return self.pooled_width + (5 if self.config.score else 6) * self.config.sizes

    @property
    def pooled_width(self) -> int:
        """E, of the pooled text that the vector begins with; 0: none."""
        return self.config.pooled * sum(tower.config.embed_dim for tower in self.named_towers.values())

    def forward(self, asks: Sequence[Ask]) -> Condition:
        """The conditions (B rows) of the asks. Raises UserError for a label or size that is unknown or missing."""
        if any(ask.weighted for ask in asks):
            return cat([self.of_texts([ask], self._read(ask)) for ask in asks])
        return self.of_texts(asks, self.texts([ask.text for ask in asks]))

    def texts(self, texts: Sequence[str]) -> Texts:
        """The texts encoded, words beyond what the tower reads cut off (`notices` says which)."""
        if not self.towers:
            return Texts()
        made = Texts(*self.of_tokens(self.tokens(texts)))
        if self.config.empty == "encoded":
            return made
        return made.only(torch.tensor([bool(text.strip()) for text in texts]))

    def _read(self, ask: Ask) -> Texts:
        """The text of an ask, encoded by the grammar of prompts if it asks for that; pooled is its first chunk.

        A tower that reads it in fewer chunks than another has empty ones behind its own.
        """
        if not ask.weighted or not ask.text.strip() or not self.towers:
            return self.texts([ask.text])
        towers = list(self.named_towers.values())
        read = [chunks.read(tower, ask.text) for tower in towers]
        most = max(len(each.tokens) for each in read)
        states = []
        for tower, each in zip(towers, read, strict=True):
            empty = [tower.encode([""])] * (most - len(each.tokens))
            states.append(torch.cat([chunks.encode(tower, each), *empty], dim=1))
        first = [
            each.tokens[:1].to(tower.positional_embedding.device) for tower, each in zip(towers, read, strict=True)
        ]
        behind = None if self.t5 is None else self.t5.weighted(ask.text, self.config.t5_tokens)
        return Texts(self._joined(torch.cat(states, dim=-1), behind), self._pooled(first))

    def without(self, texts: Texts, keep: Mapping[str, Tensor]) -> Texts:
        """Zeros for what a tower says, in the rows where its `keep` (B,) is False."""
        if texts.context is None:
            return texts
        rows = {name: keep[name].to(texts.context)[:, None] for name in self.towers}
        widths = {name: tower.config for name, tower in self.named_towers.items()}
        said = torch.cat([rows[n].expand(-1, widths[n].width) for n in widths], dim=1)
        said = F.pad(said, (0, self.context_width - said.shape[1]))[:, None]  # zeros are behind them
        own, third = texts.context.tensor_split([texts.context.shape[1] - self.config.t5_tokens], dim=1)
        context = torch.cat([own * said, third * rows["t5"][..., None] if "t5" in rows else third], dim=1)
        if texts.pooled is None:
            return Texts(context)
        return Texts(
            context, texts.pooled * torch.cat([rows[n].expand(-1, widths[n].embed_dim) for n in widths], dim=1)
        )

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """(B, L) long for each tower, where that is."""
        towers = self.named_towers.values()
        made = tuple(tower.tokenize(texts)[0].to(tower.positional_embedding.device) for tower in towers)
        return made if self.t5 is None else (*made, self.t5.tokenize(texts, self.config.t5_tokens)[0])

    def of_tokens(self, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(B, L) long for each tower -> context (B, L, D) and, where the vector has it, pooled text (B, E)."""
        towers = self.named_towers.values()
        context = torch.cat([tower(own) for tower, own in zip(towers, tokens, strict=self.t5 is None)], dim=-1)
        return self._joined(context, None if self.t5 is None else self.t5(tokens[-1])), self._pooled(tokens)

    def _joined(self, context: Tensor, behind: Tensor | None) -> Tensor:
        """What the towers say (B, L, D), with zeros up to the context's width, and what T5 says behind it, or zeros."""
        missing = self.config.t5_tokens if behind is None else 0
        context = F.pad(context, (0, self.context_width - context.shape[-1], 0, missing))
        return context if behind is None else torch.cat([context, behind.to(context)], dim=1)

    def _pooled(self, tokens: Sequence[Tensor]) -> Tensor | None:
        """(B, E) of each tower that projects, joined; None where the vector has it not."""
        if not self.config.pooled:
            return None
        read = zip(self.named_towers.values(), tokens, strict=False)  # T5's own are behind them
        joined = torch.cat([tower.features(own) for tower, own in read if tower.config.embed_dim], dim=-1)
        return joined.to(torch.promote_types(joined.dtype, torch.float32))

    def notices(self, texts: Sequence[str], weighted: bool = False) -> tuple[str, ...]:
        """A sentence for each different text that would not be read to its end, and one for all words that the tower
        does not know, or that there is none; nothing is encoded for it. `weighted`: as an ask's."""
        if not self.towers:
            some = next(filter(None, texts), "")
            said = f"this model takes no text, so nothing comes of '{some[:40]}'"
            return (printable(said),) if some else ()
        different = list(dict.fromkeys(texts))
        found = [notice for text in different for notice in grammar.notices(text)] if weighted else []
        for tower in self.named_towers.values():
            found += _notices(tower, different, weighted)
        if self.t5 is not None:
            found += _of_t5(self.t5, different, self.config.t5_tokens, weighted)
        return tuple(dict.fromkeys(map(printable, found)))

    def of_texts(self, asks: Sequence[Ask], texts: Texts) -> Condition:
        """The conditions of asks whose texts are encoded already."""
        context, parts = texts.context, [] if texts.pooled is None else [texts.pooled]
        if self.config.sizes:
            parts.append(_waves(torch.tensor([_numbers(ask, self.config.score) for ask in asks]), self.config.sizes))
        numbers = [self.number(ask.label) for ask in asks]
        label = torch.tensor(numbers) if self.classes else None
        if not parts and context is None and label is None:
            parts = [torch.zeros(len(asks), 0)]  # a network that is told nothing is told no numbers
        here = torch.device("cpu") if context is None else context.device
        vector = torch.cat([part.to(here) for part in parts], dim=1) if parts else None
        return Condition(context=context, vector=vector, label=label).to(here)

    def null(self, asks: Sequence[Ask], empty: Texts) -> Condition:
        """The asks without text and label; sizes stay. `empty`: what `texts` makes of the empty text, one row."""
        nothing = [dataclasses.replace(ask, text="", label=None) for ask in asks]
        return self.of_texts(nothing, empty.expand(len(asks)))

    def number(self, label: str | int | None) -> int:
        """The row of the network's table of classes that a label means; the null class for none. Raises UserError."""
        if label is None:
            return self.classes
        word = str(label)
        if word in self.rows:
            return self.rows[word]
        if not self.classes:
            raise UserError(f"the label '{word[:60]}' was asked for, and this model knows no labels; leave it out")
        raise UserError(f"there is no label '{word[:60]}'; this model knows {self.known}")


def _numbers(ask: Ask, score: bool) -> list[float]:
    """Six, or with the score five (Podell et al. 2023, sections 2.2 and 2.5)."""
    if ask.size is None or ask.target is None:
        raise UserError("this network is told the picture's size, which is not known here")
    if not score:
        return [float(value) for value in (*ask.size, *ask.crop, *ask.target)]
    if ask.score is None:
        raise UserError("this network is told the picture's aesthetic score, which is not known here")
    return [float(value) for value in (*ask.size, *ask.crop, ask.score)]


def _waves(values: Tensor, width: int) -> Tensor:
    """(B, K) -> (B, K width), float32: [cos | sin] of each, as a network's t (Podell et al. 2023, section 2.2)."""
    index = torch.arange(width // 2, dtype=torch.float32)
    phase = values[..., None] * torch.exp(-math.log(LONGEST_PERIOD) / (width // 2) * index)
    return torch.cat([phase.cos(), phase.sin()], dim=-1).flatten(1)


def _notices(tower: TextTower, different: Sequence[str], weighted: bool) -> list[str]:
    """What one tower does not read of texts, and which words it does not know."""
    found = []
    if weighted:
        read = [chunks.read(tower, text) for text in different]
        tokens = [row for each in read for row in each.tokens]
        dropped = [f"its last {each.dropped} tokens" if each.dropped else "" for each in read]
    else:
        tokens, dropped = tower.tokenize(different)
    for text, words in zip(different, dropped, strict=True):
        if words:
            shown = text if len(text) <= 40 else f"{text[:39]}…"
            found.append(f"the prompt '{shown}' is longer than the text tower reads; dropped: {words}")
    unknown = list(dict.fromkeys(word for row in tokens for word in tower.unknown_words(row)))
    if unknown:
        shown = ", ".join(f"'{word[:40]}'" for word in unknown[:SHOWN_WORDS])
        more = f" and {len(unknown) - SHOWN_WORDS} more" if len(unknown) > SHOWN_WORDS else ""
        found.append(
            f"the text tower does not know {shown}{more}: it takes all such words for one, so what they mean is "
            "not drawn; use words that it was trained on"
        )
    return found


def _of_t5(tower: T5Tower, different: Sequence[str], length: int, weighted: bool) -> list[str]:
    """What T5 does not read of texts."""
    texts = [flat(text)[0] for text in different] if weighted else different
    most = max(length, LONGEST) if weighted else length
    return [
        f"a prompt is longer than the {most} tokens that T5 reads; dropped: {words}"
        for words in tower.tokenize(texts, most)[1]
        if words
    ]
