"""Encoder: what is asked for -> what the network is told, one way for sampling and for training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.conditioning import chunks
from ldm.conditioning.clip import TextTower
from ldm.conditioning.condition import Condition, cat
from ldm.errors import UserError, printable
from ldm.jobs import Ask, grammar
from ldm.model_config import EncoderConfig

SHOWN_WORDS = 12  # of those unknown to a tower, in a notice
SHOWN_LABELS = 20
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


class Encoder(nn.Module):
    """Asks -> Condition.

    `text`: the tower of the captions; None for a network that takes none. `classes`: how many a class-conditional
    network knows; the label after the last is the null class. `config` has their names, and what the vector is made of.
    Raises UserError for settings that contradict each other.
    """

    def __init__(self, text: TextTower | None, config: EncoderConfig = EncoderConfig(), classes: int = 0) -> None:
        super().__init__()
        names = len(config.labels)
        if names not in (0, classes):
            raise UserError(
                f"encoder.labels has {names} names and the network {classes} classes; set model.classes={names}, or "
                "leave out encoder.labels"
            )
        if not all(config.labels) or len(set(config.labels)) != names:
            raise UserError("encoder.labels has an empty name, or one name twice; give each class a name of its own")
        if config.pooled and (text is None or not text.config.embed_dim):
            raise UserError("encoder.pooled needs a text tower with a projection (text.embed_dim above 0)")
        if config.sizes % 2 or config.sizes < 0:
            raise UserError(
                f"encoder.sizes is {config.sizes}; choose an even number (half are cosines, half sines), or 0"
            )
        self.text, self.config, self.classes = text, config, classes
        self.rows = {name: row for row, name in enumerate(config.labels or map(str, range(classes)))}

    def with_text(self, text: TextTower | None) -> Encoder:
        """The same with another tower, as one that knows more words."""
        return Encoder(text, self.config, self.classes)

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
        pooled = self.text.config.embed_dim if self.config.pooled and self.text is not None else 0
        return pooled + 6 * self.config.sizes

    def forward(self, asks: Sequence[Ask]) -> Condition:
        """The conditions (B rows) of the asks. Raises UserError for a label or size that is unknown or missing."""
        if any(ask.weighted for ask in asks):
            return cat([self.of_texts([ask], self._read(ask)) for ask in asks])
        return self.of_texts(asks, self.texts([ask.text for ask in asks]))

    def texts(self, texts: Sequence[str]) -> Texts:
        """The texts encoded, words beyond what the tower reads cut off (`notices` says which)."""
        if self.text is None:
            return Texts()
        return Texts(*self.of_tokens(self.tokens(texts)))

    def _read(self, ask: Ask) -> Texts:
        """The text of an ask, encoded by the grammar of prompts if it asks for that; pooled is its first chunk."""
        if self.text is None or not ask.weighted:
            return self.texts([ask.text])
        read = chunks.read(self.text, ask.text)
        first = read.tokens[:1].to(self.text.positional_embedding.device)
        pooled = self.text.features(first).float() if self.config.pooled else None
        return Texts(chunks.encode(self.text, read), pooled)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """(B, L) long, where the text tower is, which there must be."""
        assert self.text is not None
        return self.text.tokenize(texts)[0].to(self.text.positional_embedding.device)

    def of_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, L) long -> context (B, L, D) and, where the vector has it, pooled text (B, E)."""
        assert self.text is not None
        return self.text(tokens), self.text.features(tokens).float() if self.config.pooled else None

    def notices(self, texts: Sequence[str], weighted: bool = False) -> tuple[str, ...]:
        """A sentence for each different text that would not be read to its end, and one for all words that the tower
        does not know, or that there is none; nothing is encoded for it. `weighted`: as an ask's."""
        if self.text is None:
            some = next(filter(None, texts), "")
            said = f"this model takes no text, so nothing comes of '{some[:40]}'"
            return (printable(said),) if some else ()
        different, found = list(dict.fromkeys(texts)), []
        if weighted:
            read = [chunks.read(self.text, text) for text in different]
            tokens = [row for each in read for row in each.tokens]
            dropped = [f"its last {each.dropped} tokens" if each.dropped else "" for each in read]
            found = [notice for text in different for notice in grammar.notices(text)]
        else:
            tokens, dropped = self.text.tokenize(different)
        for text, words in zip(different, dropped, strict=True):
            if words:
                shown = text if len(text) <= 40 else f"{text[:39]}…"
                found.append(f"the prompt '{shown}' is longer than the text tower reads; dropped: {words}")
        unknown = list(dict.fromkeys(word for row in tokens for word in self.text.unknown_words(row)))
        if unknown:
            shown = ", ".join(f"'{word[:40]}'" for word in unknown[:SHOWN_WORDS])
            more = f" and {len(unknown) - SHOWN_WORDS} more" if len(unknown) > SHOWN_WORDS else ""
            found.append(
                f"the text tower does not know {shown}{more}: it takes all such words for one, so what they mean is "
                "not drawn; use words that it was trained on"
            )
        return tuple(map(printable, found))

    def of_texts(self, asks: Sequence[Ask], texts: Texts) -> Condition:
        """The conditions of asks whose texts are encoded already."""
        context, parts = texts.context, [] if texts.pooled is None else [texts.pooled]
        if self.config.sizes:
            parts.append(_waves(torch.tensor([_six(ask) for ask in asks]), self.config.sizes))
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


def _six(ask: Ask) -> list[float]:
    if ask.size is None or ask.target is None:
        raise UserError("this network is told the picture's size, which is not known here")
    return [float(value) for value in (*ask.size, *ask.crop, *ask.target)]


def _waves(values: Tensor, width: int) -> Tensor:
    """(B, K) -> (B, K width), float32: [cos | sin] of each, as a network's t (Podell et al. 2023, section 2.2)."""
    index = torch.arange(width // 2, dtype=torch.float32)
    phase = values[..., None] * torch.exp(-math.log(LONGEST_PERIOD) / (width // 2) * index)
    return torch.cat([phase.cos(), phase.sin()], dim=-1).flatten(1)
