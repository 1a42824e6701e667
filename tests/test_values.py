"""Whatever has a name can be given as a value, in txt2img, img2img and step by step alike."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ldm
from ldm import guidance, sampling
from ldm.api import LatentDiffusion
from ldm.conditioning.condition import Condition
from ldm.device import choose_device
from ldm.errors import UserError
from ldm.jobs import Ask, Settings
from ldm.sampling import NoiseStream, Step
from ldm.sampling.noise import BrownianPath
from ldm.start import Latents

FAST = Settings(steps=4, cfg=3.0)
PROMPTS = ["a cat", "a red heart"]
IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def ways(model: LatentDiffusion, settings: Settings = FAST, **given: Any) -> list[Tensor]:
    """The same in each of the library's four ways."""
    first = model.txt2img(PROMPTS, seed=3, settings=settings, **given)
    *_, last = model.sample(PROMPTS, seed=3, settings=settings, **given)
    again = model.img2img(IMAGE, PROMPTS, seed=3, settings=settings, strength=0.6, **given)
    *_, final = model.sample_img2img(IMAGE, PROMPTS, seed=3, settings=settings, strength=0.6, **given)
    assert torch.equal(model.decode(last), first) and torch.equal(model.decode(final), again)
    return [first, again]


def cases(*pairs: tuple[Any, str]) -> tuple[tuple[Any, str], ...]:
    return pairs


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_a_sampler(tiny_model: LatentDiffusion) -> None:
    def mine(denoiser: Any, x: Tensor, sigmas: Tensor, noise: Any) -> Any:
        """Euler's method, written out: no registry knows of it."""
        levels = sigmas.tolist()
        for i, (s, r) in enumerate(itertools.pairwise(levels)):
            x0 = denoiser(x, torch.tensor(s, dtype=torch.float64))
            x = x0 + r / s * (x - x0)
            yield Step(i, len(levels) - 1, s, r, x, x0)

    assert same(ways(tiny_model, sampler=mine), ways(tiny_model, sampler="euler"))
    assert same(ways(tiny_model, sampler=sampling.euler_a()), ways(tiny_model, sampler="euler_a"))
    stream = ways(tiny_model, sampler=sampling.heun(s_churn=2.0), noise=NoiseStream)
    named = dataclasses.replace(FAST, options={"s_churn": 2.0})
    assert same(stream, ways(tiny_model, named, sampler="heun"))
    with pytest.raises(UserError, match="yielded no step"):
        tiny_model.txt2img("a", sampler=lambda *_: iter(()))
    for wrong, said in cases((lambda *_: None, "the sampler gave None"), (lambda *_: [None], "yielded None")):
        for draw in (tiny_model.txt2img, tiny_model.sample, partial(tiny_model.invert, IMAGE)):
            with pytest.raises(UserError, match=said):
                list(draw("a", sampler=wrong))
    with pytest.raises(UserError, match="of a sampler with a name"):
        tiny_model.txt2img("a", sampler=mine, settings=named)


def test_a_grid(tiny_model: LatentDiffusion) -> None:
    levels = [8.0, 3.0, 0.5, 0.0]
    written = ways(tiny_model, dataclasses.replace(FAST, sigmas=tuple(levels), steps=Settings.steps))
    usual = dataclasses.replace(FAST, steps=Settings.steps)
    assert same(ways(tiny_model, usual, grid=levels), written)
    assert same(ways(tiny_model, usual, grid=torch.tensor(levels)), written)
    assert same(ways(tiny_model, grid=lambda schedule, steps: torch.tensor(levels)), written)
    assert same(ways(tiny_model, grid="karras"), ways(tiny_model, dataclasses.replace(FAST, spacing="karras")))
    for wrong, words in cases(
        ([1.0, 2.0], "goes from 1 to 2"),
        (lambda schedule, steps: [1.0], "has 1 levels"),
        ("karas", "did you mean 'karras'"),
        ("k" * 5000, f"unknown grid spacing '{'k' * 60}'; there"),
        (5, "not a list of numbers"),
        ([], "has 0 levels"),
    ):
        with pytest.raises(UserError, match=words):
            tiny_model.txt2img("a", grid=wrong)
    with pytest.raises(UserError, match="3 steps, and 7 steps"):
        tiny_model.txt2img("a", grid=levels, steps=7)


def test_a_guide(tiny_model: LatentDiffusion) -> None:
    def mine(branches: Any) -> Any:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            c, u = branches(x, sigma)
            return u + 3.0 * (c - u)

        return denoise

    usual = ways(tiny_model, negative="blue")
    own = Settings(steps=4)
    assert same(ways(tiny_model, own, guide=mine, negative="blue"), usual)
    assert same(ways(tiny_model, own, guide=lambda both: guidance.cfg(both, 3.0), negative="blue"), usual)
    settings = dataclasses.replace(own, prompt_syntax="weighted")
    both = tiny_model.txt2img("a cat AND a dog", guide=mine, settings=settings)
    assert torch.equal(both, tiny_model.txt2img("a cat AND a dog", cfg=3.0, settings=settings))
    for said, given in cases(
        ("cfg is of a guidance with a name", {"cfg": 2.0}),
        ("cfg is of a guidance with a name", {"settings": FAST}),
        ("perp_negative is of a guidance", {"settings": Settings(perp_negative=1.0)}),
    ):
        with pytest.raises(UserError, match=said):
            tiny_model.txt2img("a", guide=mine, **given)
    with pytest.raises(UserError, match=r"the guide is 7.5, which cannot be called"):
        tiny_model.txt2img("a", guide=7.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the guide gave None"):
        tiny_model.txt2img("a", guide=lambda branches: None)  # type: ignore[arg-type, return-value]


def test_several_pictures_of_each_picture(tiny_model: LatentDiffusion) -> None:
    """n of the first, then of the second; each that of its own seed, with its own mask and strength."""
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, :16], masks[1, :, 8:] = 1, 1
    given: dict[str, Any] = {"settings": FAST, "mask": masks, "n": 2, "seed": 3}
    four = tiny_model.img2img(IMAGE, PROMPTS, strength=[0.4, 0.4, 0.8, 1.0], **given)
    for i, strength in enumerate([0.4, 0.4, 0.8, 1.0]):
        alone = tiny_model.img2img(
            IMAGE[i // 2], PROMPTS[i // 2], mask=masks[i // 2], strength=strength, seed=3 + i, settings=FAST
        )
        torch.testing.assert_close(four[i : i + 1], alone, rtol=0, atol=1e-3)
    *_, last = tiny_model.sample_img2img(IMAGE, PROMPTS, strength=0.4, **given)
    torch.testing.assert_close(last.x.shape[0], 4)
    latents = tiny_model.codec.encode(IMAGE)
    assert len(tiny_model.img2img(latents=latents, prompt="a cat", n=3, settings=FAST)) == 6
    with pytest.raises(UserError, match="0 pictures of each prompt"):
        tiny_model.img2img(IMAGE, "a cat", n=0)
    for four in ({"image": IMAGE.repeat(2, 1, 1, 1)}, {"latents": latents.repeat(2, 1, 1, 1)}):  # one for each of n
        with pytest.raises(UserError, match="4 pictures to begin from were given for 2 prompts"):
            tiny_model.img2img(**four, prompt=PROMPTS, n=2, settings=FAST)


def test_a_condition(tiny_model: LatentDiffusion) -> None:
    encoder = tiny_model.encoder
    with torch.no_grad():
        told, other = ldm_cat(encoder([Ask(text)]) for text in PROMPTS), encoder([Ask("blue")])
    usual = [
        tiny_model.txt2img(PROMPTS, negative="blue", seed=3, settings=FAST),
        tiny_model.img2img(IMAGE, PROMPTS, negative="blue", seed=3, settings=FAST),
    ]
    assert same(
        [
            tiny_model.txt2img(told, negative=other, seed=3, settings=FAST),
            tiny_model.img2img(IMAGE, told, negative="blue", seed=3, settings=FAST),
        ],
        usual,
    )
    one = tiny_model.img2img(IMAGE, told[:1], seed=[3, 4], settings=FAST)  # one row serves all pictures
    assert torch.equal(one, tiny_model.img2img(IMAGE, PROMPTS[0], seed=[3, 4], settings=FAST))
    twice = tiny_model.txt2img(told, n=2, seed=3, settings=FAST)
    assert torch.equal(twice, tiny_model.txt2img(PROMPTS, n=2, seed=3, settings=FAST))
    longer = Condition(torch.cat([told.context, told.context], dim=1))  # type: ignore[list-item]
    assert not torch.equal(tiny_model.txt2img(longer, seed=3, settings=FAST), usual[0])
    for wrong, words in (
        (Condition(torch.zeros(2, 16, 7)), r"has {'context': 7}, and the network takes {'context': 32}"),
        (Condition(vector=torch.zeros(2, 3)), "the network takes"),
    ):
        with pytest.raises(UserError, match=words):
            tiny_model.txt2img(wrong, settings=FAST)
    with pytest.raises(UserError, match="2 rows for 3 prompts"):
        tiny_model.txt2img(["a", "b", "c"], negative=told, settings=FAST)


def ldm_cat(conditions: Any) -> Condition:
    from ldm.conditioning.condition import cat

    return cat(list(conditions))


def test_noise_and_latents(tiny_model: LatentDiffusion) -> None:
    noise = NoiseStream([3, 4], (4, 8, 8)).initial()
    for sampler in ("ddim", "euler_a"):
        assert same(ways(tiny_model, sampler=sampler, noise=noise), ways(tiny_model, sampler=sampler))
    assert not same(ways(tiny_model, noise=-noise), ways(tiny_model))
    one_by_one = tiny_model.txt2img(PROMPTS, noise=-noise, seed=3, batch_size=1, settings=FAST)
    torch.testing.assert_close(one_by_one, ways(tiny_model, noise=-noise)[0], atol=1e-4, rtol=0)
    seen = []

    class Mine(BrownianPath):
        def __call__(self, sigma: float, sigma_next: float) -> Tensor:
            seen.append(sigma)
            return super().__call__(sigma, sigma_next)

    assert same(ways(tiny_model, sampler="euler_a", noise=Mine), ways(tiny_model, sampler="euler_a")) and seen
    for wrong, words in cases(
        (noise[:1], "for 2 pictures is of"),
        (5, "for 2 pictures is 5"),
        (noise[:, :2], "was given for a latent of"),
        (noise * torch.nan, "not finite"),
        ([1.0, 2.0], "give a tensor"),
        (noise.numpy(), "give a tensor"),
    ):
        with pytest.raises(UserError, match=words):
            tiny_model.txt2img(PROMPTS, noise=wrong, settings=FAST)

    with torch.no_grad():
        latents = tiny_model.codec.encode(IMAGE)
    drawn = tiny_model.img2img(latents=latents, prompt=PROMPTS, seed=3, strength=0.6, settings=FAST)
    assert torch.equal(drawn, tiny_model.img2img(IMAGE, PROMPTS, seed=3, strength=0.6, settings=FAST))
    anew = tiny_model.img2img(latents=latents, prompt=PROMPTS, seed=3, strength=1, settings=FAST)
    assert torch.equal(anew, tiny_model.img2img(IMAGE, PROMPTS, seed=3, strength=1, settings=FAST))
    low = tiny_model.txt2img(
        PROMPTS, latents=latents, grid=[0.01, 0.0], seed=3, settings=dataclasses.replace(FAST, steps=Settings.steps)
    )
    with torch.no_grad():
        assert (
            float((low - tiny_model.codec.decode(latents)).abs().mean()) < 0.05
        )  # hardly any noise: it is the picture
    with pytest.raises(UserError, match="one of the two"):
        tiny_model.img2img(prompt="a")
    with pytest.raises(UserError, match="latents are a tensor"):
        tiny_model.txt2img(latents=[1.0])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="for 1 pictures"):
        tiny_model.txt2img("a", latents=latents)
    with pytest.raises(UserError, match="not finite"):
        Latents(latents * torch.inf)


def test_a_network(tiny_model: LatentDiffusion) -> None:
    told_of: list[Any] = []

    class Mine:
        """Another function in the U-Net's place: without `prepare` it is told the condition itself."""

        def __call__(self, x: Tensor, t: Tensor, told: Condition) -> Tensor:
            told_of.append(told)
            return tiny_model.unet(x, t, told)

    assert same(ways(tiny_model, network=Mine()), ways(tiny_model))
    assert isinstance(told_of[0], Condition) and len(told_of[0]) == 4
    assert same(ways(tiny_model, network=tiny_model.unet), ways(tiny_model))
    with pytest.raises(UserError, match="network is 5"):
        tiny_model.txt2img("a", network=5)  # type: ignore[arg-type]
    blank = tiny_model.txt2img("a", network=lambda x, t, told: torch.zeros_like(x), settings=FAST)
    assert bool(blank.isfinite().all())


def test_each_picture_its_own(tiny_model: LatentDiffusion) -> None:
    """Prompt, seed, mask and strength of each picture are its own, and draw what they draw alone."""
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, :16], masks[1, :, :, 16:] = 1, 1
    given: dict[str, Any] = {
        "prompt": PROMPTS,
        "seed": [7, 3],
        "strength": [0.3, 0.8],
        "mask": masks,
        "negative": ["x", "blue"],
    }
    both = tiny_model.img2img(IMAGE, settings=FAST, **given)
    for i in range(2):
        alone = {name: value[i] for name, value in given.items()}
        one = tiny_model.img2img(IMAGE[i : i + 1], settings=FAST, **{**alone, "mask": masks[i : i + 1]})
        torch.testing.assert_close(both[i : i + 1], one, atol=1e-4, rtol=0)
    mixed = tiny_model.img2img(IMAGE[:1], ["a"] * 3, strength=[0.2, 0.7, 0.2], seed=[1, 2, 1], settings=FAST)
    torch.testing.assert_close(mixed[0], mixed[2], atol=1e-4, rtol=0)
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-2)
    with pytest.raises(UserError, match="3 strengths were given for 2 pictures"):
        tiny_model.img2img(IMAGE, PROMPTS, strength=[0.1, 0.2, 0.3])
    with pytest.raises(UserError, match="is nan; give finite"):
        tiny_model.img2img(IMAGE, PROMPTS, strength=[0.1, torch.nan])
    with pytest.raises(UserError, match="not a number"):
        tiny_model.img2img(IMAGE, PROMPTS, strength=["a", "b"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="give them one strength"):
        next(tiny_model.sample_img2img(IMAGE, PROMPTS, strength=[0.1, 0.2]))  # type: ignore[arg-type]


# ---------------------------------------------------------------- devices


def test_a_model_moves_and_changes_its_precision(tiny_checkpoint: Path) -> None:
    model = ldm.load(tiny_checkpoint, device="cpu")
    usual, digest = model.txt2img("a cat", settings=FAST), model.hash
    assert model.to("cpu", torch.bfloat16) is model and model.precision == torch.bfloat16
    half = model.txt2img("a cat", settings=FAST)
    assert 0 < float((half - usual).abs().mean()) < 0.1
    assert model.to(dtype="fp32").precision == torch.float32 and model.hash == digest
    saving = ldm.load(tiny_checkpoint, device="cpu", low_memory=True).to("cpu")
    assert saving.works_on == torch.device("cpu")
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"dtype": torch.int64}, "no precision 'int64'"),
        ({"dtype": "fp8"}, "no precision 'fp8'"),
    )
    for wrong, words in refused:
        with pytest.raises(UserError, match=words):
            model.to(**wrong)


def test_one_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no cuda device"):
            choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    for name, words in (("cuda:2", "cuda:0 to cuda:1"), ("cuda:", "no device"), ("cuda:-1", "no device")):
        with pytest.raises(UserError, match=words):
            choose_device(name)
