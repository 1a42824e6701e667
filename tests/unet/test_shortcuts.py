"""Token merging and feature reuse: each against its definition, where they are exact, and what they do not go with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ldm
from ldm import generate, redraw
from ldm.backends.graph import graphed
from ldm.conditioning.condition import Condition
from ldm.errors import UserError
from ldm.jobs import Beginning, Request, Settings
from ldm.jobs.plan import Merge, Reuse
from ldm.start import Picture
from ldm.unet.attention import SelfAttention
from ldm.unet.shortcuts import cells, merged_tokens, modules_of, shortened, taken

from .small import inputs, relative, small_unet


def evaluate(network: Any, times: Sequence[float], told: Any = None, height: int = 8, width: int = 8) -> list[Tensor]:
    """At each time from the same x; `told` begins a trajectory."""
    x, _, context = inputs(height=height, width=width)
    told = network.prepare(Condition(context)) if told is None else told
    with torch.no_grad():
        return [network(x, torch.full((2,), t), told) for t in times]


# ---------------------------------------------------------------- token merging


def test_one_token_of_each_cell_is_a_target():
    to, others = cells(6, 8, seed=3)
    assert sorted([*to.tolist(), *others.tolist()]) == list(range(48))
    found = {(place // 8 // 2, place % 8 // 2) for place in to.tolist()}
    assert len(to) == 12 == len(found)
    assert not torch.equal(cells(6, 8, seed=4)[0], to) and torch.equal(cells(6, 8, seed=3)[0], to)
    to, others = cells(5, 3, seed=0)
    assert len(to) == 2 and max(to.tolist()) < 12 and len(others) == 13


def test_the_most_alike_are_averaged_into_their_nearest():
    """By loops over tokens, as the paper says it."""
    x = torch.randn(2, 24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    to, others = cells(4, 6, seed=1)
    merged, place = merged_tokens(x, to, others, share=0.4)
    assert merged.shape == (2, 24 - 9, 6)
    wanted = torch.empty_like(x)
    for row in range(2):
        angles = F.cosine_similarity(x[row, :, None], x[row, None], dim=-1).tolist()
        likeness = {(a, b): angles[a][b] for a in others.tolist() for b in to.tolist()}
        nearest = {a: max(to.tolist(), key=lambda b: likeness[a, b]) for a in others.tolist()}
        gone = sorted(nearest, key=lambda a: -likeness[a, nearest[a]])[:9]
        for token in range(24):
            group = nearest[token] if token in gone else token
            members = [group, *(a for a in gone if nearest[a] == group)] if group in to.tolist() else [token]
            wanted[row, token] = x[row, members].mean(0)
    torch.testing.assert_close(taken(merged, place), wanted)


def test_it_is_exact_where_the_tokens_of_each_cell_are_equal():
    """Each key stands for as many as any other then, and softmax does not notice."""
    layer = SelfAttention(8, 2)
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    x = x.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    merged, place = merged_tokens(x, *cells(6, 8, seed=2), share=0.75)
    assert merged.shape[1] == 12
    torch.testing.assert_close(taken(layer(merged), place), layer(x))


def test_of_a_network_the_finest_level_alone_is_merged_and_all_is_as_before_after():
    unet = small_unet(multipliers=(1, 1, 2), attention_levels=(1, 2))
    (usual,) = evaluate(unet, [400.0], height=16, width=12)
    seen: list[int] = []
    hooks = [
        each.register_forward_hook(lambda layer, given, out: seen.append(given[0].shape[1]))
        for each in unet.modules()
        if isinstance(each, SelfAttention)
    ]
    (none,) = evaluate(shortened(unet, [Merge(0.001)]), [400.0], height=16, width=12)
    (some,) = evaluate(shortened(unet, [Merge(0.5)]), [400.0], height=16, width=12)
    for hook in hooks:
        hook.remove()
    assert relative(none, usual) < 1e-5, "no token merged, but all of them in another order"
    assert 1e-4 < relative(some, usual) < 0.7
    assert seen[: len(seen) // 2].count(48) == seen[len(seen) // 2 :].count(24) == 3 and seen.count(12) == 8
    assert torch.equal(evaluate(unet, [400.0], height=16, width=12)[0], usual)


def test_other_tokens_are_targets_at_each_evaluation():
    unet = shortened(small_unet(), [Merge(0.5)])
    first, second = evaluate(unet, [400.0, 400.0])
    assert not torch.equal(first, second)
    assert all(torch.equal(*pair) for pair in zip(evaluate(unet, [400.0, 400.0]), (first, second), strict=True))


def test_a_network_that_fails_is_as_before_after():
    unet = small_unet()
    (usual,) = evaluate(unet, [400.0])
    for shortcut in (Merge(0.5), Reuse(2)):
        network = shortened(unet, [shortcut])
        told = network.prepare(Condition(inputs()[2]))
        evaluate(network, [400.0], told)
        with pytest.raises(RuntimeError):
            network(torch.zeros(2, 3, 8, 8), torch.zeros(2), told)
        assert torch.equal(evaluate(unet, [400.0])[0], usual)
        assert not any("forward" in vars(module) or module._forward_hooks for module in unet.modules())


# ---------------------------------------------------------------- feature reuse


@pytest.mark.parametrize("branch", range(4))
def test_where_nothing_has_changed_reuse_changes_nothing(branch: int):
    """The same x and t again: what was kept is what would be computed. So it is at each whole evaluation."""
    unet = small_unet()
    network = shortened(unet, [Reuse(3, branch)])
    usual = evaluate(unet, [400.0, 100.0], height=7, width=10)
    first, again, other, whole = evaluate(network, [400.0, 400.0, 100.0, 100.0], height=7, width=10)
    assert torch.equal(first, usual[0]) and torch.equal(again, usual[0]) and torch.equal(whole, usual[1])
    assert not torch.equal(other, usual[1])
    assert relative(other, usual[1]) < 1


def test_the_shallow_ends_meet_the_features_of_the_last_whole_evaluation():
    """Ma et al. 2023, section 3.2, for the shallowest skip: U_1(F_2 of before, D_0 of now)."""
    unet, kept = small_unet(), list[Tensor]()
    last = modules_of(unet.up)[-1]
    hook = last.register_forward_hook(lambda stage, given, out: kept.append(given[0]))
    evaluate(unet, [400.0])
    hook.remove()
    x, _, context = inputs()
    told = unet.prepare(Condition(context))
    with torch.no_grad():
        embedding = F.silu(unet.time_embedding(unet.time_features(torch.full((2,), 380.0))))
        h = last(kept[0], embedding, told.kv, unet.conv_in(x))
        wanted = unet.conv_out(F.silu(unet.norm_out(h)))
    _, found = evaluate(shortened(unet, [Reuse(2)]), [400.0, 380.0])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("branch", "stages"), [(0, 1), (1, 3), (2, 4), (3, 6)])
def test_what_rests_does_not_run(branch: int, stages: int):
    unet = small_unet()  # down: stage, smaller, stage; middle: 2; up: 2 stages, larger, 2 stages
    ran: list[Any] = []
    for module in [*modules_of(unet.down), *unet.middle, *modules_of(unet.up)]:
        for part in module.children():
            part.register_forward_hook(lambda *given, module=module: ran.append(module))
    network = shortened(unet, [Reuse(2, branch)])
    evaluate(network, [400.0])
    assert len(dict.fromkeys(ran)) == 10
    told = network.prepare(Condition(inputs()[2]))
    evaluate(network, [400.0], told)
    ran.clear()
    evaluate(network, [390.0], told)
    resampling = [*(level.resample for level in unet.down), *(level.resample for level in unet.up)]
    assert len([module for module in dict.fromkeys(ran) if module not in resampling]) == stages


def test_trajectories_do_not_meet():
    network = shortened(small_unet(), [Reuse(2)])
    _, alone = evaluate(network, [400.0, 380.0])
    told = [network.prepare(Condition(inputs()[2])) for _ in range(2)]
    evaluate(network, [400.0], told[0])
    evaluate(network, [900.0], told[1])
    assert torch.equal(evaluate(network, [380.0], told[0])[0], alone)


def test_what_was_kept_before_a_guidance_interval_is_not_used_behind_it():
    unet = small_unet()
    network = shortened(unet, [Reuse(2)])
    outside, inside, piece = (network.prepare(Condition(inputs()[2])) for _ in range(3))
    (usual,) = evaluate(unet, [300.0])
    evaluate(network, [900.0], outside)
    evaluate(network, [900.0], piece)
    assert not torch.equal(evaluate(network, [300.0], outside)[0], usual), "a piece of the same batch between"
    evaluate(network, [900.0], inside)
    evaluate(network, [800.0, 700.0, 600.0], outside)
    evaluate(network, [500.0, 400.0], inside)
    for told in (outside, piece):
        assert torch.equal(evaluate(network, [300.0], told)[0], usual)


# ---------------------------------------------------------------- in use

HOW = Settings(sampler="ddim", steps=4, cfg=3.0)
BOTH = replace(HOW, merge_tokens=0.5, reuse=2, reuse_branch=1)


def test_a_picture_comes_out_again_and_stands_beside_the_plain_one(tiny_model: ldm.LatentDiffusion):
    def draw(settings: Settings, seeds: Sequence[int] = (5, 6)) -> Tensor:
        requests = [Request("a heart", seed=seed) for seed in seeds]
        return generate.draw(tiny_model, requests, settings.plan())

    plain, both = draw(HOW), draw(BOTH)
    assert torch.equal(draw(BOTH), both) and torch.equal(draw(HOW), plain)
    for settings in (replace(BOTH, merge_tokens=None, reuse_branch=0), replace(BOTH, reuse=None, reuse_branch=0)):
        assert not torch.equal(draw(settings), plain)
    assert float((both - plain).abs().mean()) < 0.2
    torch.testing.assert_close(draw(BOTH, [6]), both[1:], rtol=0, atol=1e-3)


def test_low_memory_pieces_have_their_own(tiny_model: ldm.LatentDiffusion):
    requests = [Request("a heart", seed=5), Request("a star", seed=6)]
    together = generate.draw(tiny_model, requests, BOTH.plan())
    apart = generate.draw(replace(tiny_model, works_on=torch.device("cpu")), requests, BOTH.plan())
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-3)


def test_a_picture_says_it(tiny_model: ldm.LatentDiffusion, tmp_path):
    from ldm import provenance

    record = provenance.record(tiny_model, BOTH, [Request("a heart")], 0)
    assert (record["merge_tokens"], record["reuse"], record["reuse_branch"]) == (0.5, 2, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(merge_tokens=0.9), "merge_tokens is 0.9"),
        (Settings(merge_tokens=0.0), "merge_tokens is 0;"),
        (Settings(reuse=1), "reuse is 1"),
        (Settings(reuse_branch=1), "reuse_branch is 1; choose 0 or more, and reuse with it"),
        (Settings(reuse=2, reuse_branch=-1), "reuse_branch is -1"),
        (Settings(reuse=2, sampler="DPM adaptive"), "dpm_adaptive measures its own error, and reuse"),
        (Settings(reuse=2, sampler="Restart"), "restart goes back to high levels"),
        (Settings(merge_tokens=0.5, sampler="ode"), "ode measures its own error, and merge_tokens"),
    ],
)
def test_nonsense_is_refused(settings: Settings, words: str):
    with pytest.raises(UserError, match=words):
        settings.plan()


def test_what_they_do_not_go_with_is_refused(tiny_model: ldm.LatentDiffusion):
    with pytest.raises(UserError, match="reuse_branch is 9; this U-Net has 3 stages"):
        shortened(small_unet(), [Reuse(2, 9)])
    with pytest.raises(UserError, match="no tokens to merge"):
        shortened(small_unet(attention_levels=()), [Merge()])
    with pytest.raises(UserError, match="backends compile, graph and openvino"):
        shortened(graphed(small_unet()), [Merge()])
    with pytest.raises(UserError, match="not a plain U-Net"):
        shortened(torch.nn.Linear(1, 1), [Merge()])
    with pytest.raises(UserError, match="attention is looked at"), tiny_model.attention_maps():
        tiny_model.txt2img("a heart", settings=BOTH)
    request, image = Request("a heart"), torch.zeros(1, 3, 64, 64)
    with pytest.raises(UserError, match="leave out reuse, or choose a window of 64 pixels"):
        generate.draw(tiny_model, [request], BOTH.plan(), picture=Picture(image, 0.5, window=32))
    generate.draw(tiny_model, [request], BOTH.plan(), picture=Picture(image, 0.5, window=64))  # one place
    with pytest.raises(UserError, match="leave out reuse, or choose a window of 64 pixels"):
        begin, drawn = Beginning(enlarge=2, window=0), lambda steps: pytest.fail("it is said before anything is drawn")
        redraw.drawn(tiny_model, [request], BOTH.plan(), begin=begin, watch=drawn)
    own = replace(BOTH.plan(), network=lambda x, t, told: x)
    with pytest.raises(UserError, match="a network of its own"):
        generate.draw(tiny_model, [Request("a heart")], own)


def test_neither_waits_for_the_device(tiny_model: ldm.LatentDiffusion):
    from backends.test_compile_and_graph import Waits

    with Waits() as waits:
        hook = tiny_model.unet.register_forward_hook(lambda *given: waits.on_device.__setitem__(given[2], True))
        try:
            steps = list(tiny_model.sample("a heart", settings=BOTH))
        finally:
            hook.remove()
        assert steps[-1].x in waits.on_device and not waits.asked
