"""Prompt-to-prompt (Hertz et al. 2022): a picture drawn again with other words, where attention stays as it was.

A source and a target are drawn side by side from the same noise, rows 0 and 1 of each batch. In the first steps the
target looks where the source looked: at the tokens that both prompts have, and at a word that stands in another's place
where that one was looked at. A word that only the target has is looked at as the target likes. So swapping a word and
adding some (refinement) are one thing; and words may be looked at more or less than they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import SequenceMatcher

import torch
from torch import Tensor, nn

from ldm.conditioning.clip import TextTower
from ldm.errors import UserError
from ldm.unet.looking import Look, looking, same
from ldm.unet.maps import words_of

LARGEST = 16**2
"""Positions of the self-attention that is taken over: coarse layers have the layout, fine ones the target's details."""


@contextmanager
def prompt_to_prompt(
    unet: nn.Module,
    text: TextTower | None,
    source: str,
    target: str,
    weights: Mapping[str, float] | None = None,
    cross: float = 0.8,
    itself: float = 0.4,
    told: Tensor | None = None,
) -> Iterator[None]:
    """Inside, `unet` draws batches of two, told `source` and `target`, the second one after the first.

    `weights`: of the target's words, 1 as it is, 2 twice as much; also of a source that is the target. `cross` and
    `itself`: for which share of the time, from the start, attention to the prompt and to the picture is taken over.
    The branches of guidance that are told something else are left alone. `told`: the Look's of the pair; a batch that
    begins with another is refused.

    Raises UserError for that, for a word that the target has not, shares outside [0, 1], and a network or model that
    has no text to look at.
    """
    for name, share in (("cross", cross), ("itself", itself)):
        if not 0 <= share <= 1:
            raise UserError(f"the share '{name}' of prompt_to_prompt is {share:g}; choose it from 0 to 1")
    if text is None:
        raise UserError("this model takes no text, so there are no words to change")
    taken, scales = _alignment(text, source, target), _scales(text, target, weights or {})
    first: list[Look] = []

    def change(look: Look) -> Tensor | None:
        if not first:
            first.append(look)
        if not same(look.told[:2], first[0].told[:2]):
            return None  # the branch that is told something else, evaluated by itself
        if len(look.weights) % 2:
            raise UserError(
                "prompt_to_prompt draws two prompts in one batch, the source and the target; give both, to a model "
                "that was not loaded with low_memory"
            )
        done = 1 - look.t / first[0].t
        if done >= (cross if look.crosses else itself):
            return None
        changed = look.weights.clone()
        if look.crosses:
            table, read = taken.to(changed), changed[:2, ..., : len(taken)]
            if bool(changed[:2, ..., len(taken) :].any()):
                raise UserError(
                    "prompt_to_prompt draws prompts that the text tower reads at once, and these are longer; shorten "
                    "them"
                )
            if told is not None and not same(look.told[:2, : told.shape[1]], told.to(look.told)):
                raise UserError(
                    "inside prompt_to_prompt its source and target are drawn, plain and in this order, and nothing else"
                )
            own = (table.sum(0) == 0).to(changed)  # the tokens that only the target has
            changed[1, ..., : len(taken)] = (read[0] @ table + read[1] * own) * scales.to(changed)
        else:
            changed[1] = changed[0]
        return changed

    with looking(unet, change, lambda crosses, queries: crosses or queries <= LARGEST):
        yield


def _alignment(text: TextTower, source: str, target: str) -> Tensor:
    """(L, L): which share of a source's token (row) a target's (column) takes over; a column of its own is 0.

    A word in another's place takes over all that its tokens have, in equal parts.
    """
    rows = text.tokenize([source, target])[0].tolist()
    table = torch.zeros(len(rows[0]), len(rows[0]))
    for tag, i, i_end, j, j_end in SequenceMatcher(None, *rows, autojunk=False).get_opcodes():
        if tag == "equal":
            table[i:i_end, j:j_end] = torch.eye(i_end - i)
        elif tag == "replace":
            table[i:i_end, j:j_end] = 1 / (j_end - j)
    return table


def _scales(text: TextTower, target: str, weights: Mapping[str, float]) -> Tensor:
    """(L,) the factor of each of the target's tokens."""
    scales, words = torch.ones(text.config.context_length), words_of(text, target)
    for word, scale in weights.items():
        places = [place for each, places in words if each.lower() == word.lower() for place in places]
        if not places:
            raise UserError(f"'{word}' is no word of the prompt '{target[:60]}', so it has no weight; name one that is")
        scales[places] = float(scale)
    return scales
