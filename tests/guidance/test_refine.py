"""A second model takes over below a level: the same trajectory as of a denoiser that is switched there."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import TINY, tiny_parts
from torch import Tensor

from ldm import LatentDiffusion, generate, load
from ldm.checkpoints import native
from ldm.errors import UserError
from ldm.guidance import refined
from ldm.helpers import Helpers
from ldm.jobs import Request, Settings
from ldm.jobs.plan import Refine


def base(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.zeros_like(x)


def fine(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.ones_like(x)


def test_each_picture_has_the_model_of_its_level():
    x, both = torch.zeros(3, 1, 2, 2), refined(base, fine, 0.5)
    assert both(x, torch.tensor(0.5)).unique().tolist() == [0]
    assert both(x, torch.tensor(0.4)).unique().tolist() == [1]
    assert both(x, torch.tensor([1.0, 0.4, 0.5])).flatten(1).mean(1).tolist() == [0, 1, 0]


def other_of(model: LatentDiffusion) -> LatentDiffusion:
    unet = copy.deepcopy(model.unet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return dataclasses.replace(model, unet=unet)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize("below", ["20%", "1.0"])
def test_a_trajectory_is_that_of_the_switched_denoiser(tiny_model: LatentDiffusion, sampler: str, below: str):
    """Second-order methods too, and those that add noise, which they add as without a refiner."""
    finer, requests, shape = other_of(tiny_model), [Request("a red heart", "blue", seed=1)], (4, 8, 8)
    shape = tiny_model.codec.latent_shape(16, 16)
    alone = Settings(steps=6, sampler=sampler, width=16, height=16).plan()
    plan = Settings(steps=6, sampler=sampler, width=16, height=16, refiner="finer", refine_below=below).plan()
    *_, last = generate.sample(tiny_model, requests, plan, Helpers(refiners={"finer": finer}))

    schedule = finer.law.schedule
    share = schedule.sigma(torch.tensor(0.2 * schedule.steps - 0.5, dtype=torch.float64))
    level = float(share) if below == "20%" else 1.0
    sigmas = generate.make_sigmas(tiny_model, alone)
    noise = generate.make_noise(alone, requests, shape, tiny_model.device)
    parts = [generate.make_denoiser(m, requests, alone, Helpers(), shape, None)[0] for m in (tiny_model, finer)]
    from ldm.sampling import start

    x = start(noise.initial(), tiny_model.law.schedule, sigmas)

    def switched(x: Tensor, sigma: Tensor) -> Tensor:
        return parts[int(sigma < level)](x, sigma)

    with torch.no_grad():
        *_, wanted = generate.make_sampler(tiny_model, alone)(switched, x, sigmas, noise)
        *_, plain = generate.sample(tiny_model, requests, alone)
    assert torch.equal(last.x, wanted.x)
    assert not torch.equal(last.x, plain.x)


def test_below_the_level_a_learned_variance_is_the_refiners(tmp_path: Path):
    """As of the refiner alone, and the base is not asked; one that learned none leaves it to the base."""
    assert TINY.unet
    unet = dataclasses.replace(TINY.unet, out_channels=2 * TINY.unet.out_channels)
    config = dataclasses.replace(TINY, unet=unet, learned_variance=True)
    native.save(tmp_path / "learned", config, tiny_parts(config))  # type: ignore[arg-type]
    model, half, asked = load(tmp_path / "learned", device="cpu"), TINY.unet.out_channels, []
    finer = other_of(model)
    with torch.no_grad():
        for unet, v in ((model.unet, 1.0), (finer.unet, -1.0)):
            unet.conv_out.weight[half:] = 0
            unet.conv_out.bias[half:] = v
    model.unet.register_forward_hook(lambda *_: asked.append(1))

    def drawn(one: LatentDiffusion, refiner: LatentDiffusion | None = None) -> Tensor:
        words = {} if refiner is None else {"refiner": "finer", "refine_below": "1e6"}
        plan = Settings(steps=4, sampler="ddpm", options={"variance": "learned"}, width=16, height=16, **words).plan()
        helpers = Helpers() if refiner is None else Helpers(refiners={"finer": refiner})
        *_, last = generate.sample(one, [Request("a cat", seed=1)], plan, helpers)
        return last.x

    assert torch.equal(drawn(model, finer), drawn(finer)) and not asked
    plain = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet))
    native.save(tmp_path / "plain", plain, tiny_parts(plain))  # type: ignore[arg-type]
    assert bool(drawn(model, load(tmp_path / "plain", device="cpu")).isfinite().all()) and asked


def test_a_share_is_of_the_trained_levels(tiny_model: LatentDiffusion):
    """The refiner has the levels t = 0 ... 0.2 T - 1, and the base 0.2 T and those above."""
    schedule = tiny_model.law.schedule
    first = round(0.2 * schedule.steps)
    last, above = schedule.sigma(torch.tensor([first - 1.0, first], dtype=torch.float64)).tolist()
    assert last < generate._below(tiny_model, Refine("a", None, 0.2)) < above


@pytest.mark.parametrize("word", ["0", "100%", "much", "-3", "nan"])
def test_a_level_that_is_none_is_refused(word: str):
    with pytest.raises(UserError, match="refine_below"):
        Settings(refiner="icons", refine_below=word).plan()


def test_what_does_not_go_together_is_refused(tiny_model: LatentDiffusion, tmp_path: Path):
    with pytest.raises(UserError, match="no refiner"):
        Settings(refine_below="0.5").plan()
    with pytest.raises(UserError, match="guide model"):
        Settings(refiner="a", guide_model="b").plan()
    for settings, said in (
        (Settings(original_size=(8, 8)), "told no sizes"),
        (Settings(crop=(1, 0)), "told no sizes"),
        (Settings(score=7), "told no score"),
    ):
        with pytest.raises(UserError, match=said):
            tiny_model.txt2img("a", settings=settings)
