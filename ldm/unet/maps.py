"""Cross-attention maps: where in the picture each token of a prompt is looked at (Hertz et al. 2022; Tang et al. 2022).

They are averaged over the heads as they come, and kept in half precision on the CPU: 2 h w L bytes for each row of the
network's batch, layer and evaluation. Stable Diffusion v1.5 at 512 pixels, with guidance, keeps 2 MB an evaluation of
layers up to 32 x 32, 0.4 MB up to 16 x 16.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.conditioning.clip import TextTower
from ldm.errors import UserError
from ldm.unet.looking import Look, looking, same


@dataclass(frozen=True, eq=False)
class Map:
    """What one layer looked at in one evaluation: `weights` (B, L, h, w), float16, add up to 1 over L.

    B are the rows of the network's batch: the pictures told of their prompts, then, in the same batch, of what they are
    guided away from. A method of two evaluations a step has two of each; where memory is short and a batch is evaluated
    in pieces, each piece is an evaluation of its own, which says nothing of the batch's other pictures. `pictures` are
    those of the batch, by their numbers.
    """

    pictures: range
    layer: str
    evaluation: int
    t: float
    told: Tensor  # (B, W), as a Look's
    weights: Tensor


@dataclass(eq=False)
class Maps:
    """The maps of what is drawn in `model.attention_maps()`, in order; pictures are numbered through all batches."""

    text: TextTower | None
    kept: list[Map] = field(default_factory=list)
    pictures: range | None = None  # of the batch that is drawn; None: nobody says, and rows stand for pictures

    def begin(self, count: int) -> None:
        """A batch of so many pictures begins."""
        first = 0 if self.pictures is None else self.pictures.stop
        self.pictures = range(first, first + count)

    def clear(self) -> None:
        """Forget what was drawn; the next picture is number 0."""
        self.kept.clear()
        self.pictures = None

    def tokens(self, row: int = 0, layers: str = "", steps: slice = slice(None)) -> Tensor:
        """(L, h, w) float32: where picture `row` looks at each token, the mean over layers and evaluations.

        `layers`: only those with this in their names, as "up" or "middle"; `steps`: of the evaluations, as slice(10).
        Smaller maps are enlarged to the largest. Raises UserError where nothing was kept of it, or of a piece of its
        batch, by whose rows it cannot be told from others.
        """
        batch = [each for each in self.kept if row in each.pictures]
        chosen = [each for each in batch if layers in each.layer and _tells(each, batch[0], row)]
        if any(len(each.told) < len(each.pictures) for each in chosen or batch):
            raise UserError(
                f"the batch of picture {row} was evaluated in pieces, as low_memory has it, so its maps cannot be told "
                "from others'; draw with batch_size=1"
            )
        times = sorted({each.evaluation for each in chosen})[steps]
        maps = [each.weights[row - each.pictures.start].float() for each in chosen if each.evaluation in times]
        if not maps:
            raise UserError(
                f"no attention map was kept of picture {row} and the layers '{layers}'; draw inside "
                "`with model.attention_maps() as maps:`"
            )
        size = max((each.shape[1:] for each in maps), key=lambda size: size[0] * size[1])
        return torch.stack([_enlarged(each, size) for each in maps]).mean(0)

    def words(
        self, prompt: str, row: int = 0, layers: str = "", steps: slice = slice(None)
    ) -> list[tuple[str, Tensor]]:
        """Each word of `prompt`, in order, and where picture `row` looks at it (h, w): the mean over its tokens.

        Words that the tower does not read are left out. Raises UserError as `tokens`, and for a model without text.
        """
        tokens = self.tokens(row, layers, steps)
        return [(word, tokens[places].mean(0)) for word, places in words_of(self.text, prompt)]

    def keep(self, look: Look) -> None:
        weights = look.weights.mean(1).transpose(1, 2).unflatten(-1, look.size)
        rows = self.pictures or range(len(look.told))
        self.kept.append(Map(rows, look.layer, look.evaluation, look.t, look.told.cpu(), weights.half().cpu()))


@contextmanager
def attention_maps(unet: nn.Module, text: TextTower | None, size: int = 32) -> Iterator[Maps]:
    """What `unet` looks at inside the block, in layers of at most `size` x `size` positions. No bit of what is drawn
    changes. Raises UserError for a network without cross-attention."""
    maps = Maps(text)
    with looking(unet, maps.keep, lambda crosses, queries: crosses and queries <= size**2):
        yield maps


def words_of(text: TextTower | None, prompt: str) -> list[tuple[str, list[int]]]:
    """The words and signs of `prompt` in order, each with its places among the tokens (0 is the start).

    Raises UserError for a model that takes no text.
    """
    if text is None:
        raise UserError("this model takes no text, so there are no words to look at")
    encode = text.tokenizer().encode
    whole = encode(prompt)
    for pattern in (r"\w+|[^\w\s]+", r"\S+"):  # the finest that is cut as the whole is
        words = re.findall(pattern, prompt)
        pieces = [encode(word) for word in words]
        if [token for piece in pieces for token in piece] == whole:
            break
    found, place = [], 1
    for word, piece in zip(words, pieces, strict=True):
        if place + len(piece) < text.config.context_length:  # the last place is the end's
            found.append((word, list(range(place, place + len(piece)))))
        place += len(piece)
    return [(word, places) for word, places in found if places]


def _tells(each: Map, first: Map, row: int) -> bool:
    """Whether the row is told the same as at the beginning: where branches run one after another, they differ."""
    place = row - each.pictures.start
    return place < min(len(first.told), len(each.told)) and same(each.told[place], first.told[place])


def _enlarged(maps: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(maps[None], size=list(size), mode="bilinear", align_corners=False)[0]
