"""The grammar of prompts on the way to a picture: what is compared, what is said, what a PNG keeps."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import FAST, draw

from ldm import generate, image_io, provenance
from ldm.api import LatentDiffusion, PromptNotice
from ldm.errors import UserError
from ldm.guidance import cfg
from ldm.helpers import NONE
from ldm.jobs import Ask, Request, Settings

WEIGHTED = Settings(steps=4, cfg=3.0, prompt_syntax="weighted")


def weighted(model: LatentDiffusion, *requests: Request, **changes: Any) -> torch.Tensor:
    return draw(model, list(requests), prompt_syntax="weighted", **changes)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_plain_words_draw_the_same_bits(tiny_model: LatentDiffusion) -> None:
    requests = [Request("a red cat", "blue", 3), Request("a dog", "", 4)]
    plain = draw(tiny_model, requests)
    assert torch.equal(weighted(tiny_model, *requests), plain)
    ones = [replace(request, prompt=f"({request.prompt}:1)") for request in requests]
    assert torch.equal(weighted(tiny_model, *ones), plain)
    assert apart(draw(tiny_model, ones), plain) > 1e-3  # a library caller's brackets are letters, unless asked


def test_weights_and_lengths_change_the_picture_alone(tiny_model: LatentDiffusion) -> None:
    """A negative of another length, and neighbours in the batch of another: masks hide what is not there."""
    short, long = Request("a red (cat:1.4)", "blue", 3), Request("cat " * 40, "dog " * 20, 4)
    both = weighted(tiny_model, short, long)
    assert apart(both[:1], weighted(tiny_model, short)) < 1e-4 and apart(both[1:], weighted(tiny_model, long)) < 1e-4
    assert apart(both[:1], draw(tiny_model, [replace(short, prompt="a red cat")])) > 1e-3
    assert apart(both[1:], draw(tiny_model, [long])) > 1e-3  # words beyond the tower's length are read


@torch.no_grad()
def test_and_is_a_sum_of_guidances(tiny_model: LatentDiffusion) -> None:
    texts, scale = ["a cat", "a dog", "blue"], 3.0
    branches = generate.branches_of(tiny_model, [[Ask(text)] for text in texts])
    plan = replace(WEIGHTED, cfg=scale).plan()
    request = Request("a cat :0.8 AND a dog:-0.3", "blue", 3)
    denoiser, _ = generate.make_denoiser(tiny_model, [request], plan, NONE, (4, 8, 8), None)
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double(), torch.tensor(2.0)
    cat, dog, blue = branches(x, sigma)
    torch.testing.assert_close(denoiser(x, sigma), blue + scale * (0.8 * (cat - blue) - 0.3 * (dog - blue)))
    alone, _ = generate.make_denoiser(tiny_model, [request], replace(WEIGHTED, cfg=1.0).plan(), NONE, (4, 8, 8), None)
    torch.testing.assert_close(alone(x, sigma), blue + 0.8 * (cat - blue) - 0.3 * (dog - blue))


def test_one_clause_and_its_neighbours(tiny_model: LatentDiffusion) -> None:
    """A picture of one prompt beside one of three; the same prompt twice is twice the guidance."""
    one, three = Request("a cat", "blue", 3), Request("a cat AND a dog AND red :0.5", "", 4)
    both = weighted(tiny_model, one, three)
    assert apart(both[:1], draw(tiny_model, [one])) < 1e-4
    assert apart(both[1:], weighted(tiny_model, three)) < 1e-4
    twice = weighted(tiny_model, replace(one, prompt="a cat AND a cat"), cfg=1.5)
    assert apart(twice, draw(tiny_model, [one], cfg=3.0)) < 1e-4
    halves = replace(one, prompt="a cat:0.5 AND a cat:0.5")
    assert apart(weighted(tiny_model, halves, perp_negative=0.7), draw(tiny_model, [one], perp_negative=0.7)) < 1e-4
    assert apart(weighted(tiny_model, halves, cfg_rescale=0.5), draw(tiny_model, [one], cfg_rescale=0.5)) < 1e-4
    assert apart(draw(tiny_model, [three]), weighted(tiny_model, three)) > 1e-3  # plain: AND is a word
    negative = replace(one, negative="red AND blue")  # there it is a word, too
    assert torch.equal(weighted(tiny_model, negative), draw(tiny_model, [negative]))


def test_and_does_not_go_with_a_guide_model(tiny_model: LatentDiffusion, tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="AND do not go with a guide model"):
        weighted(tiny_model, Request("a AND b"), guide_model=str(tiny_checkpoint))


def test_what_is_said(tiny_model: LatentDiffusion) -> None:
    def told(prompt: str, settings: Settings, negative: str = "") -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            tiny_model.txt2img(prompt, negative=negative, settings=replace(settings, steps=1))
        return [str(each.message) for each in found if each.category is PromptNotice]

    assert not told("cat " * 40, WEIGHTED) and "dropped" in told("cat " * 40, FAST)[0]
    assert "'[cat:dog:0.5]'" in told("a [cat:dog:0.5] AND red", WEIGHTED)[0]
    assert "'[a|b]'" in told("a", WEIGHTED, "[a|b]")[0] and not told("a [a|b]", FAST)
    with pytest.raises(UserError, match="more than 16"):
        told(" AND ".join("a" * 20), WEIGHTED)
    assert not told("a", WEIGHTED, " AND ".join("a" * 8))


def test_a_png_says_how_its_prompt_was_read(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    """An earlier one says nothing, and was plain."""
    request = Request("a (cat:1.3)", "", 5)
    for settings, syntax in ((FAST, "plain"), (WEIGHTED, "weighted")):
        image = draw(tiny_model, [request], prompt_syntax=syntax)
        path = image_io.save_numbered(image[0], tmp_path, provenance.record(tiny_model, settings, [request], 0))
        recipe = provenance.read(path)
        assert recipe.settings.prompt_syntax == syntax
        again = generate.draw(tiny_model, recipe.batch, recipe.settings.plan())
        assert torch.equal(again[recipe.index], image[0])
    record = provenance.record(tiny_model, FAST, [request], 0)
    assert record.pop("prompt_syntax") == "plain"
    old = image_io.save_numbered(image[0], tmp_path, json.loads(json.dumps(record)))
    assert not provenance.read(old).settings.plan().weighted


def test_at_scale_1_a_negative_prompt_acts_on_joined_prompts_alone(tiny_model: LatentDiffusion) -> None:
    settings, requests = replace(WEIGHTED, cfg=1.0), [Request("a AND b", "blue")]
    assert not settings.without_effect(requests) and replace(settings, prompt_syntax=None).without_effect(requests)
    assert apart(weighted(tiny_model, *requests, cfg=1.0), weighted(tiny_model, Request("a AND b"), cfg=1.0)) > 1e-4


def test_an_unknown_syntax() -> None:
    with pytest.raises(UserError, match="unknown prompt syntax 'heavy'; there are plain, weighted"):
        Settings(prompt_syntax="heavy").check()


def test_guiding_many_prompts_as_one() -> None:
    """`together` is what a rule of guidance takes: the interval and the rescaling act on the joined prompt."""
    from guidance.test_several import PREDICTIONS, SIGMA, Fixed, X

    from ldm.guidance import together

    joined = together(Fixed(), [(1.0,), (0.5,), (-0.5,)])
    c, u, *others = PREDICTIONS
    first = u + (c - u) + 0.5 * (others[0] - u) - 0.5 * (others[1] - u)
    torch.testing.assert_close(cfg(joined, 3.0)(X, SIGMA), u + 3 * (first - u))
    torch.testing.assert_close(cfg(joined, 3.0, interval=(50.0, 60.0))(X, SIGMA), first)


def test_between_a_short_prompt_and_a_long_one_each_tower_is_mixed_with_itself(tiny_model: LatentDiffusion) -> None:
    """T5's places (zeros of it here, as where it was left out) stay behind the chunks of the others."""
    from ldm.told import conditions

    encoder = copy.deepcopy(tiny_model.encoder)
    encoder.config = replace(encoder.config, t5_tokens=5)
    model, ends = replace(tiny_model, encoder=encoder), ("a cat", " ".join(["dog"] * 20))
    assert tiny_model.encoder.text is not None
    length = tiny_model.encoder.text.config.context_length
    between = conditions(model, [Ask(ends[0], weighted=True, toward=(ends[1], 0.25))])
    short, long = (conditions(model, [Ask(end, weighted=True)]).context for end in ends)
    assert short is not None and long is not None and between.context is not None
    assert long.shape[1] == 2 * length + 5 and short.shape[1] == length + 5
    first, second, behind = between.context.split([length, length, 5], dim=1)
    torch.testing.assert_close(first, torch.lerp(short[:, :length], long[:, :length], 0.25))
    torch.testing.assert_close(second, 0.25 * long[:, length : 2 * length])
    assert not behind.any() and between.mask is not None and bool(between.mask.all())


def test_a_stranger_does_not_say_how_much_is_drawn_at_once(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    request = Request("a cat", "", 5)
    for side, size, at_once in ((1024, 1024, 16), (4096, 2, 1), (64, 9, 9)):
        settings = replace(FAST, width=side, height=side)
        record = provenance.record(tiny_model, settings, [request] * size, size - 1)
        recipe = provenance.read(image_io.save_numbered(torch.zeros(3, 8, 8), tmp_path, json.loads(json.dumps(record))))
        assert len(recipe.batch) == at_once and recipe.place == at_once - 1
        said = f"in a batch of {size}, and is drawn in one of {at_once} now"
        assert any(said in each for each in provenance.differences(recipe, tiny_model)) == (at_once < size)
