"""What a model is told of what is asked for, its predictions of that, and what of a prompt it does not read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.backends.sparing import InPieces, visiting
from ldm.conditioning.condition import Condition, cat, lerp, widths
from ldm.diffusion import Branches, LearnedVariance, bind
from ldm.errors import UserError
from ldm.jobs import Ask, Request, grammar

if TYPE_CHECKING:
    from ldm.model import Model


def branches_of(
    model: Model,
    asks: Sequence[Sequence[Ask]],
    planes: Tensor | None = None,
    network: Callable[..., Any] | None = None,
    scale: float = 1.0,
) -> Branches:
    """The model's predictions for K lists of B asks, each with the same `planes` (B, C, h, w) beside the latent.

    `network` stands in the place of the model's own; it means by x, t and its output what that means. `scale` is told
    to a network that is told its guidance, and to no other.
    """
    with torch.no_grad():
        told = [replace(conditions(model, some), planes=planes) for some in asks]
    if model.config.told_guidance:
        told = [replace(each, guidance=torch.full((len(each),), scale, device=model.device)) for each in told]
    pieces = InPieces(network or model.unet, None if model.works_on is None else 1)
    return (LearnedVariance if model.law.learned_variance else bind)(pieces, told, model.law)


def conditions(model: Model, asks: Sequence[Ask]) -> Condition:
    """What the model is told (B rows).

    Each ask is read by itself (and once): in a batch its last bits would depend on how many others there are.
    """
    with visiting(model, model.encoder):
        read = {ask: _told(model, ask) for ask in dict.fromkeys(asks)}
    return cat([read[ask] for ask in asks]).to(model.device)


def _told(model: Model, ask: Ask) -> Condition:
    """One row: what the encoder makes of an ask, or of two, or what is given in its place, of the same parts."""
    if ask.toward is not None:
        (other, share), one = ask.toward, replace(ask, toward=None)
        ends = model.encoder([one]), model.encoder([replace(one, text=other)])
        return lerp(*ends, share, behind=model.encoder.config.t5_tokens)
    if ask.told is None:
        return model.encoder([ask])
    given, usual = ask.told.to(model.device), model.encoder([replace(ask, text="", label=None, told=None)])
    if widths(given) != widths(usual):
        raise UserError(
            f"the condition that was given has {widths(given)}, and the network takes {widths(usual)} (the widths of "
            "its parts); generate.conditions makes such ones"
        )
    return given


def prompt_notices(model: Model, requests: Sequence[Request], weighted: bool = False) -> tuple[str, ...]:
    """What a user should know of how the prompts and negative prompts are read, as `plan.weighted` says they are:
    `Encoder.notices`; that a model of classes alone is told none; and that a negative prompt is not used. Raises
    UserError for a label that the model does not know."""
    encoder, labels = model.encoder, dict.fromkeys(request.label for request in requests)
    for label in labels:
        encoder.number(label)
    texts: list[str] = []
    for request in requests:
        prompts = [clause.text for clause in grammar.clauses(request.prompt)] if weighted else [request.prompt]
        texts += [*prompts, *request.texts[1:]]
    found = encoder.notices(texts, weighted)
    if model.config.told_guidance and any(request.negative or request.told_not is not None for request in requests):
        found += (f"{model.name or 'this model'} is told its guidance scale, and nothing comes of a negative prompt",)
    if encoder.text is None and encoder.classes and None in labels:
        found += (f"no label was given, so any class may be drawn; this model knows {encoder.known}",)
    return found
