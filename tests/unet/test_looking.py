"""Attention read and changed from outside: nothing else changes, and what is read is the formula's."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.api import LatentDiffusion
from ldm.conditioning.condition import Condition
from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.unet import UNet
from ldm.unet import prompt_to_prompt as room
from ldm.unet.looking import Look, See, Wants, looking
from ldm.unet.maps import _tells, attention_maps, words_of
from ldm.unet.prompt_to_prompt import _alignment, prompt_to_prompt

from .small import SMALL, inputs, small_unet

ALL = lambda crosses, queries: True  # noqa: E731
PROMPT, OTHER = "a red cat", "a red dog"


def attends_of(unet: UNet) -> list[object]:
    return [module.attends for module in unet.modules() if hasattr(module, "attends")]


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_seen_is_the_softmax_and_what_it_makes_is_the_output(masked: bool):
    """Handed its own weights back, the network puts out the same, to rounding; and reading alone changes no bit."""
    unet, (x, t, context) = small_unet(), inputs(height=6, width=10)
    told = Condition(context, torch.arange(5)[None] < torch.tensor([[5], [3]]) if masked else None)
    usual, looks = unet(x, t, told), list[Look]()
    with looking(unet, looks.append, ALL):  # type: ignore[arg-type]
        assert torch.equal(unet(x, t, told), usual)
    assert [look.crosses for look in looks] == [False, True] * 4
    assert {look.size for look in looks} == {(3, 5)} and {look.evaluation for look in looks} == {0}
    for look in looks:
        torch.testing.assert_close(look.weights.sum(-1), torch.ones_like(look.weights[..., 0]))
        assert not masked or not look.crosses or not look.weights[1, ..., 3:].any()
    with looking(unet, lambda look: look.weights, ALL):
        torch.testing.assert_close(unet(x, t, told), usual, rtol=1e-4, atol=1e-5)
        assert not torch.equal(unet(2 * x, t, told), usual)
    with looking(unet, lambda look: torch.zeros_like(look.weights), ALL):
        assert not torch.allclose(unet(x, t, told), usual, rtol=1e-2, atol=1e-2)
    assert torch.equal(unet(x, t, told), usual)


def test_all_is_as_it_was_after_an_error_and_after_nested_blocks():
    unet, (x, t, context) = small_unet(), inputs()
    usual, before = unet(x, t, context), attends_of(unet)
    with pytest.raises(RuntimeError, match="of the caller"), looking(unet, lambda look: None, ALL):
        raise RuntimeError("of the caller")
    assert attends_of(unet) == before and not unet._forward_pre_hooks

    def broken(look: Look) -> None:
        raise ValueError("of the reader")

    with pytest.raises(ValueError, match="of the reader"), looking(unet, broken, ALL):
        unet(x, t, context)
    assert attends_of(unet) == before and not unet._forward_pre_hooks
    with attention_maps(unet, None) as outer:
        unet(x, t, context)
        with attention_maps(unet, None) as inner:
            assert torch.equal(unet(x, t, context), usual)
        unet(x, t, context)
    assert (len(outer.kept), len(inner.kept)) == (12, 4)
    assert torch.equal(outer.kept[4].weights, inner.kept[0].weights)
    assert attends_of(unet) == before and not unet._forward_pre_hooks
    unet(x, t, context)
    assert len(outer.kept) == 12


def test_a_compiled_network_runs_layer_by_layer_meanwhile():
    unet, (x, t, context) = small_unet(), inputs()
    unet._compiled_call_impl = lambda *inputs: "compiled"
    with attention_maps(unet, None) as maps:
        assert unet(x, t, context).shape == x.shape and len(maps.kept) == 4
    assert unet(x, t, context) == "compiled"


def test_maps_are_the_heads_mean_and_no_larger_than_asked():
    unet, (x, t, context) = small_unet(attention_levels=(0, 1)), inputs(height=8, width=6)
    looks: list[Look] = []
    with looking(unet, looks.append, lambda crosses, queries: crosses), attention_maps(unet, None, size=4) as maps:  # type: ignore[arg-type]
        unet(x, t, context)
    small = [look for look in looks if look.size == (4, 3)]
    assert {look.size for look in looks} == {(8, 6), (4, 3)} and len(maps.kept) == len(small) > 0
    for kept, look in zip(maps.kept, small, strict=True):
        assert (kept.layer, kept.t, kept.weights.dtype) == (look.layer, look.t, torch.float16)
        wanted = look.weights.mean(1).reshape(2, 4, 3, 5).movedim(-1, 1)
        torch.testing.assert_close(kept.weights.float(), wanted, rtol=0, atol=1e-3)
    mean = torch.stack([each.weights[1].float() for each in maps.kept]).mean(0)
    torch.testing.assert_close(maps.tokens(1), mean)
    torch.testing.assert_close(maps.tokens(1, layers="middle"), maps.kept[1].weights[1].float())
    with pytest.raises(UserError, match="no attention map was kept of picture 2"):
        maps.tokens(2)
    with pytest.raises(UserError, match="no attention map was kept"):
        maps.tokens(layers="nothing")


def test_networks_without_it_are_refused():
    with (
        pytest.raises(UserError, match="no attention of the kind"),
        attention_maps(UNet(replace(SMALL, context_width=0)), None),
    ):
        pass


@pytest.mark.parametrize("settings", [Settings(steps=3), Settings(steps=2, sampler="heun"), Settings(steps=3, cfg=1)])
def test_no_bit_of_a_picture_changes(tiny_model: LatentDiffusion, settings: Settings):
    prompts = [PROMPT, "a blue cat"]
    usual = tiny_model.txt2img(prompts, settings=settings)
    with tiny_model.attention_maps() as maps:
        assert torch.equal(tiny_model.txt2img(prompts, settings=settings), usual)
    evaluations = {"heun": 3}.get(settings.sampler, settings.steps)
    layers = {each.layer for each in maps.kept}
    assert len(maps.kept) == evaluations * len(layers)
    assert {len(each.weights) for each in maps.kept} == {2 if settings.cfg == 1 else 4}
    assert sorted({each.t for each in maps.kept}, reverse=True) == list(dict.fromkeys(each.t for each in maps.kept))
    words = maps.words("a blue cat", row=1)
    assert [word for word, _ in words] == ["a", "blue", "cat"] and words[0][1].shape == (4, 4)
    torch.testing.assert_close(words[2][1], maps.tokens(1)[3])
    last = maps.tokens(0, steps=slice(-1, None))
    torch.testing.assert_close(last, torch.stack([m.weights[0].float() for m in maps.kept[-len(layers) :]]).mean(0))


def test_pictures_are_numbered_through_the_batches(tiny_model: LatentDiffusion):
    """In batches of one each picture's maps are those it has alone, and none is what it is guided away from."""
    given: dict[str, Any] = {"steps": 2, "cfg": 3.0, "negative": "a green dog"}
    with tiny_model.attention_maps() as maps:
        tiny_model.txt2img([PROMPT, OTHER, PROMPT], seed=5, batch_size=1, **given)
        for row, prompt in enumerate([PROMPT, OTHER, PROMPT]):
            with tiny_model.attention_maps() as alone:
                tiny_model.txt2img(prompt, seed=5 + row, **given)
            torch.testing.assert_close(maps.tokens(row), alone.tokens(0), rtol=0, atol=1e-3)
            assert not torch.allclose(maps.tokens(row), maps.tokens((row + 1) % 3), rtol=0, atol=1e-4)
        assert len({each.pictures.start for each in maps.kept}) == 6  # those drawn within are seen here too
        with pytest.raises(UserError, match="no attention map was kept of picture 6"):
            maps.tokens(6)
        with pytest.raises(UserError, match="no attention map was kept of picture 1"):
            alone.tokens(1)
        maps.clear()
        tiny_model.txt2img(OTHER, seed=6, **given)
        torch.testing.assert_close(maps.tokens(0).sum(0), torch.ones(4, 4), rtol=0, atol=1e-2)
    assert not tiny_model.kept["onlookers"]


def test_the_pieces_of_a_batch_are_not_taken_for_one_of_its_pictures(tiny_model: LatentDiffusion):
    """As low_memory has them: a row each, which of the pictures' nobody says."""
    spared = replace(tiny_model, works_on=torch.device("cpu"))
    for prompt in (PROMPT, OTHER):
        with spared.attention_maps() as maps:
            spared.txt2img([PROMPT, prompt], steps=2, cfg=3)
        for row in range(2):
            with pytest.raises(UserError, match=f"picture {row} was evaluated in pieces.*batch_size=1"):
                maps.tokens(row)
    found = []
    for model, size in ((spared, 1), (tiny_model, 2)):
        with model.attention_maps() as maps:
            model.txt2img([PROMPT, PROMPT], steps=2, cfg=3, batch_size=size)
        found.append([maps.tokens(row) for row in range(2)])
    assert not torch.allclose(*found[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(*found, rtol=0, atol=1e-3)


def test_branches_evaluated_one_after_another_are_told_apart():
    """As where memory is short: the maps of a picture are those in which it is told its prompt."""
    unet, (x, t, context) = small_unet(), inputs()
    other = context.flip(1)
    with attention_maps(unet, None) as maps:
        for told in (context, other, context, other):
            unet(x, t, unet.prepare(Condition(told)))
        unet(x.repeat(2, 1, 1, 1), t.repeat(2), unet.prepare(Condition(torch.cat([context, other]))))
    chosen = [each for each in maps.kept if _tells(each, maps.kept[0], 1)]
    assert {each.evaluation for each in chosen} == {0, 2, 4}


def test_words_and_their_places(tiny_model: LatentDiffusion):
    text = tiny_model.text
    assert text is not None
    tokens = text.tokenizer().encode("A burger, photographed by zzyzx")
    found = words_of(text, "A burger, photographed by zzyzx")
    assert [word for word, _ in found] == ["A", "burger", ",", "photographed", "by", "zzyzx"]
    assert [place for _, places in found for place in places] == list(range(1, len(tokens) + 1))
    assert len(dict(found)["zzyzx"]) > 1
    assert words_of(text, "") == []
    long = words_of(text, "a b c d e f g h i j k l m n o p q r s t")
    assert long[-1] == ("n", [14]), "of 16 places, the start's and the end's are not words'"
    with pytest.raises(UserError, match="takes no text"):
        words_of(None, "a cat")


# ---------------------------------------------------------------- prompt to prompt


def test_tokens_are_aligned(tiny_model: LatentDiffusion):
    text = tiny_model.text
    assert text is not None
    swap = _alignment(text, "a red cat", "a red dog")
    assert torch.equal(swap, torch.eye(16))
    refined = _alignment(text, "a cat", "a big cat")
    assert refined[:, 2].sum() == 0 and refined[1, 1] == refined[2, 3] == refined[3, 4] == 1
    longer = _alignment(text, "a cat", "a zzyzx")
    pieces = len(text.tokenizer().encode("zzyzx"))
    assert pieces > 1 and longer[2, 2 : 2 + pieces].tolist() == pytest.approx([1 / pieces] * pieces)
    shorter = _alignment(text, "a zzyzx", "a cat")
    assert shorter[2 : 2 + pieces, 2].tolist() == [1] * pieces, "all that was looked at is, still"


def pair(model: LatentDiffusion, source: str, target: str, **options) -> Tensor:
    with model.prompt_to_prompt(source, target, **options):
        return model.txt2img([source, target], seed=[5, 5], steps=4, cfg=4.0)


def test_the_source_is_untouched_and_the_target_follows_it(tiny_model: LatentDiffusion):
    usual = tiny_model.txt2img([PROMPT, OTHER], seed=[5, 5], steps=4, cfg=4.0)
    found = pair(tiny_model, PROMPT, OTHER)
    torch.testing.assert_close(found[0], usual[0], rtol=0, atol=1e-4)
    assert not torch.allclose(found[1], usual[1], rtol=0, atol=1e-3)
    assert torch.equal(pair(tiny_model, PROMPT, OTHER, cross=0, itself=0), usual)
    same = pair(tiny_model, PROMPT, PROMPT, cross=1, itself=1)
    torch.testing.assert_close(same[1], same[0], rtol=0, atol=1e-4)


def test_a_swapped_word_is_looked_at_where_the_other_was(tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch):
    """While the share lasts, and in no row but the target's; a word of the target alone keeps what it has."""
    given: list[See] = []

    @contextmanager
    def taken(unet: UNet, see: See, wants: Wants):
        given.append(see)
        yield

    monkeypatch.setattr(room, "looking", taken)
    with prompt_to_prompt(tiny_model.unet, tiny_model.text, "a cat", "a big cat", {"a": 2.0}, 0.5, 0.25):
        (see,) = given
    weights = torch.rand(4, 2, 9, 16, generator=torch.Generator().manual_seed(1)).softmax(-1)
    told = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))

    def look(t: float, crosses: bool = True, told: Tensor = told) -> Look:
        return Look("layer", crosses, 0, t, told, (3, 3), weights[: len(told)])

    changed = see(look(99.0))
    assert changed is not None and torch.equal(changed[[0, 2, 3]], weights[[0, 2, 3]])
    source, target = weights[0], changed[1]
    torch.testing.assert_close(target[..., 0], source[..., 0])
    torch.testing.assert_close(target[..., 1], 2 * source[..., 1])
    torch.testing.assert_close(target[..., 2], weights[1, ..., 2])
    torch.testing.assert_close(target[..., 3:], source[..., 2:-1])
    layout = see(look(80.0, crosses=False))
    assert layout is not None and torch.equal(layout[1], weights[0]) and torch.equal(layout[2:], weights[2:])
    assert see(look(70.0, crosses=False)) is None and see(look(70.0)) is not None and see(look(49.0)) is None
    assert see(look(99.0, told=told[2:])) is None, "a branch of guidance, evaluated by itself"


def test_the_shares_are_those_of_the_evaluations(tiny_model: LatentDiffusion):
    """An outer block is shown what prompt-to-prompt leaves as it is: the last two of four steps, all layers of them."""
    left: list[Look] = []
    with (
        looking(tiny_model.unet, left.append, ALL),  # type: ignore[arg-type]
        tiny_model.prompt_to_prompt(PROMPT, OTHER, cross=0.5, itself=0.5),
    ):
        tiny_model.txt2img([PROMPT, OTHER], seed=[5, 5], steps=4, cfg=4.0)
    layers = len(attends_of(tiny_model.unet))
    assert [look.evaluation for look in left] == [2] * layers + [3] * layers


def test_weights_of_words(tiny_model: LatentDiffusion):
    plain, more = (pair(tiny_model, PROMPT, PROMPT, weights=w) for w in (None, {"Cat": 3.0}))
    assert not torch.allclose(more[1], plain[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(more[0], plain[0], rtol=0, atol=1e-4)


def test_prompts_of_several_chunks(tiny_model: LatentDiffusion):
    """A longer negative prompt pads the two, whose words stay aligned; longer prompts of the two are refused."""
    weighted = Settings(steps=2, cfg=4.0, prompt_syntax="weighted")
    with tiny_model.prompt_to_prompt(PROMPT, PROMPT, cross=1, itself=1):
        found = tiny_model.txt2img([PROMPT] * 2, negative="a red cat, " * 20, seed=[5, 5], settings=weighted)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)
    long = "a red cat, " * 20
    with pytest.raises(UserError, match="reads at once"), tiny_model.prompt_to_prompt(PROMPT, long):
        tiny_model.txt2img([PROMPT, long], settings=weighted)


def test_what_makes_no_pair_is_refused(tiny_model: LatentDiffusion):
    for options, said in (
        ({"cross": 1.5}, "'cross' of prompt_to_prompt is 1.5"),
        ({"itself": float("nan")}, "'itself'"),
        ({"weights": {"bird": 2}}, "'bird' is no word"),
    ):
        with pytest.raises(UserError, match=said), tiny_model.prompt_to_prompt(PROMPT, OTHER, **options):
            pass
    before = attends_of(tiny_model.unet)
    with pytest.raises(UserError, match="two prompts in one batch"), tiny_model.prompt_to_prompt(PROMPT, OTHER):
        tiny_model.txt2img(PROMPT, steps=1, cfg=1)
    others = [OTHER, PROMPT], [PROMPT, "a blue dog"]
    for prompts in others:
        with pytest.raises(UserError, match="and nothing else"), tiny_model.prompt_to_prompt(PROMPT, OTHER):
            tiny_model.txt2img(prompts, steps=1, cfg=1)
    with pytest.raises(UserError, match="and nothing else"), tiny_model.prompt_to_prompt(PROMPT, OTHER):
        tiny_model.txt2img(PROMPT, steps=1, cfg=4.0)  # the second row is the negative prompt's
    assert attends_of(tiny_model.unet) == before
    with pytest.raises(UserError, match="takes no text"), prompt_to_prompt(small_unet(), None, PROMPT, OTHER):
        pass
