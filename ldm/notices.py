"""What a caller of the library should know of a drawing, as warnings. No torch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm.helpers import Helpers
from ldm.jobs import Plan, Request, grammar
from ldm.jobs.plan import Cfg

if TYPE_CHECKING:
    from ldm.model import Model


class PromptNotice(UserWarning):
    """A prompt has words that the text tower does not read or does not know; the message names them."""


class PictureNotice(UserWarning):
    """A picture is not drawn just as it was given; the message says how."""


def tell(model: Model, requests: Sequence[Request], plan: Plan, helpers: Helpers, of_start: Sequence[str] = ()) -> None:
    """Warn, in the name of the caller's caller, of what is not drawn just as it was given."""
    from ldm import told

    for notice in of_start:
        warnings.warn(notice, PictureNotice, stacklevel=3)
    if not model.config.told_guidance and _unguided(requests, plan) and any(request.negative for request in requests):
        words = "at guidance scale 1 nothing is guided, so nothing comes of a negative prompt"
        warnings.warn(words, PromptNotice, stacklevel=3)
    for reader in (model, *helpers.readers):
        for notice in told.prompt_notices(reader, requests, plan.weighted):
            warnings.warn(notice, PromptNotice, stacklevel=3)


def _unguided(requests: Sequence[Request], plan: Plan) -> bool:
    """Whether nothing is compared with a negative prompt, as at the scale of a model that has guidance in it."""
    joined = plan.weighted and any(len(grammar.clauses(request.prompt)) > 1 for request in requests)
    return isinstance(plan.guide, Cfg) and plan.guide.scale == 1 and not plan.guide.plus and not joined
