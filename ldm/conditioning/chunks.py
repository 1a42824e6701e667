"""A prompt with weights, of any length -> context, by one tower: chunk by chunk, each of what the tower reads at once.

    z = z_e + w (z_w - z_e)        z_w: a token's state in its chunk, z_e: the state at its place in the empty prompt

The weight w interpolates from the empty prompt and beyond the word, so 1 is the word as it is, exactly, and 0 nothing
of it. (Multiplying states and bringing their mean back, as the first user interfaces do, divides by a mean that is all
but 0 on some towers.) Chunks are encoded each by itself, between a start and an end of its own, and joined along L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning.clip import END, PADDING, START, VOCABULARY, TextTower, bounded
from ldm.jobs import grammar

LONGEST = 32  # chunks: a prompt may be a stranger's, and attention looks at all of its tokens
BACK = 20  # tokens: so near its end a full chunk is cut behind a comma, if there is one

Tokens = list[tuple[int, float]]
"""(token, weight), one after another."""


@dataclass(frozen=True, eq=False)
class Chunks:
    """n chunks of a prompt; `dropped`: how many tokens there are beyond the longest prompt that is read."""

    tokens: Tensor  # (n, L) long, on the CPU
    weights: Tensor  # (n, L) float32; 1 for start, end and padding
    dropped: int = 0


def read(tower: TextTower, prompt: str) -> Chunks:
    """The chunks of a prompt; the empty prompt is one empty chunk.

    A chunk ends at BREAK, and where it is full: then behind its last comma if that is at most `BACK` tokens from its
    end, as in the user interfaces, and never inside a word of a textual inversion.
    """
    tokenizer, length = tower.tokenizer(), tower.config.context_length
    comma = tokenizer.encode(",")
    rows: list[Tokens] = []
    for parts in grammar.chunks(prompt):
        pairs = [(token, part.weight) for part in parts for token in tokenizer.encode(bounded(part.text))]
        rows += _cut(pairs, length - 2, comma[0] if len(comma) == 1 else -1)
    if len(rows) > 1 and not rows[-1]:  # a BREAK at the end begins nothing
        rows.pop()
    kept, beyond = rows[:LONGEST], rows[LONGEST:]
    tokens = torch.full((len(kept), length), PADDING[tower.config.padding], dtype=torch.long)
    weights = torch.ones(len(kept), length)
    for i, row in enumerate(kept):
        tokens[i, : len(row) + 2] = torch.tensor([START, *(token for token, _ in row), END])
        weights[i, 1 : len(row) + 1] = torch.tensor([weight for _, weight in row])
    return Chunks(tokens, weights, sum(map(len, beyond)))


def encode(tower: TextTower, chunks: Chunks) -> Tensor:
    """-> context (1, n L, D), on the tower's device.

    A chunk is encoded alone, so its last bits are those of the plain prompt, whatever stands in the others.
    """
    here = tower.positional_embedding.device
    states = torch.cat([tower(row[None].to(here)) for row in chunks.tokens])
    weights = chunks.weights.to(states)[..., None]
    if bool((weights != 1).any()):
        empty = tower.encode([""])
        states = torch.where(weights == 1, states, empty + weights * (states - empty))
    return states.flatten(0, 1)[None]


def _cut(pairs: Tokens, room: int, comma: int) -> Sequence[Tokens]:
    rows = []
    while len(pairs) > room:
        end = next((i for i in range(room, max(room - BACK, 0), -1) if pairs[i - 1][0] == comma), room)
        if pairs[room][0] == comma:  # which then begins the next one
            end = room
        while end > 1 and _inside_a_word(pairs[end - 1][0], pairs[end][0]):
            end -= 1
        end = room if end == 1 else end
        rows.append(pairs[:end])
        pairs = pairs[end:]
    return [*rows, pairs]


def _inside_a_word(before: int, token: int) -> bool:
    """Whether both are of one word of a textual inversion, whose tokens are numbered on behind CLIP's."""
    return before >= VOCABULARY and token == before + 1
