"""Textual inversion (Gal et al. 2022): new words of a text tower, each some vectors of its embedding table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.clip import VOCABULARY, TextTower
from ldm.errors import UserError


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word and the vectors (n, D) that stand in its place, one after the other; `second`: those (n, E) for a model's
    second text tower. `source` names it in errors, `remark` is what its user should know of how it was read ("; passed
    over: t5")."""

    word: str
    vectors: Tensor
    source: str = "the embedding"
    remark: str = ""
    second: Tensor | None = None


class TowerWithWords(TextTower):
    """`tower` that knows the words of `embeddings` too, wherever they stand in a prompt (upper or lower case).

    It shares the tower's networks, and knows the words that the tower knows. A word of n vectors takes n places of the
    context. Raises UserError for vectors of another width, for a word with white space in it, and for one word twice.
    """

    def __init__(self, tower: TextTower, embeddings: Sequence[Embedding]) -> None:
        nn.Module.__init__(self)
        self.config = tower.config
        for name in ("positional_embedding", "transformer", "ln_final", "text_projection"):
            setattr(self, name, getattr(tower, name))
        self.register_buffer("causal_mask", tower.causal_mask, persistent=False)
        width = tower.config.width
        for embedding in embeddings:
            _check(embedding, width)
        table = tower.token_embedding
        like = next(table.parameters())
        extra = [e.vectors.to(like.device, like.dtype) for e in embeddings]
        self.token_embedding = _LongerTable(table, torch.cat([*extra, like.new_empty(0, width)]))
        rows = torch.arange(VOCABULARY) if tower.rows is None else tower.rows.cpu()
        more = torch.arange(table.num_embeddings, self.token_embedding.num_embeddings)
        self.register_buffer("rows", torch.cat([rows, more]), persistent=False)
        self.words: dict[str, list[int]] = dict(tower.words) if isinstance(tower, TowerWithWords) else {}
        first = len(rows)
        for embedding in embeddings:
            word = embedding.word.lower()
            if word in self.words:
                raise UserError(f"{embedding.source} brings the word '{embedding.word}', as another file does")
            self.words[word] = list(range(first, first + len(embedding.vectors)))
            first += len(embedding.vectors)

    def tokenizer(self) -> Any:
        """The tower's own, with the words."""
        return _WordTokenizer(super().tokenizer(), self.words)


class _LongerTable(nn.Module):
    """An embedding table and, numbered on from its end, more rows (n, D) that can be trained by themselves."""

    def __init__(self, table: nn.Embedding | _LongerTable, extra: Tensor) -> None:
        super().__init__()
        self.table = table
        self.extra = nn.Parameter(extra, requires_grad=False)
        self.num_embeddings = table.num_embeddings + len(extra)

    def forward(self, rows: Tensor) -> Tensor:
        """rows (B, L) long -> (B, L, D)"""
        known = self.table.num_embeddings
        vectors = self.table(rows.clamp(max=known - 1))
        if not len(self.extra):
            return vectors
        own = self.extra[(rows - known).clamp(min=0)].to(vectors.dtype)
        return torch.where((rows >= known)[..., None], own, vectors)


class _WordTokenizer:
    """`encode` and `clean_fn` of another tokenizer, with words that have tokens of their own."""

    def __init__(self, inner: Any, words: Mapping[str, Sequence[int]]) -> None:
        self.inner, self.words = inner, words
        longest_first = sorted(words, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(_alone, longest_first)) or '(?!)'})", re.IGNORECASE)

    def clean_fn(self, text: str) -> str:
        return self.inner.clean_fn(text)

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without start, end and padding."""
        tokens: list[int] = []
        for part in self.pattern.split(text):
            tokens += self.words[part.lower()] if part.lower() in self.words else self.inner.encode(part)
        return tokens


def _alone(word: str) -> str:
    """A pattern of `word` that is not part of a longer one: "cat" is not in "cats", "<cat>" is in "a<cat>"."""
    before, after = r"(?<!\w)" if word[0].isalnum() else "", r"(?!\w)" if word[-1].isalnum() else ""
    return f"{before}{re.escape(word)}{after}"


def _check(embedding: Embedding, width: int) -> None:
    if not embedding.word or not embedding.word.isprintable() or re.search(r"\s", embedding.word):
        word = repr(embedding.word[:100])
        raise UserError(f"{embedding.source} brings the word {word}; a word is letters without white space")
    if embedding.vectors.ndim != 2 or embedding.vectors.shape[1] != width or not len(embedding.vectors):
        raise UserError(
            f"{embedding.source} was made for another text tower: its vectors are {tuple(embedding.vectors.shape)} and "
            f"the tower's {width} wide"
        )
