"""Pictures walked up to their noise: what comes back, how near, and what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest
import torch
from torch import Tensor

import ldm
from ldm import generate
from ldm.api import LatentDiffusion
from ldm.errors import UserError
from ldm.helpers import NONE
from ldm.inverted import Inverted
from ldm.inverting import of_picture
from ldm.jobs import Settings, of_prompts
from ldm.model_config import DrawingConfig
from ldm.null_text import null_text
from ldm.sampling import ddim, euler, euler_a
from ldm.sampling.inversion import rise
from ldm.sampling.step import solver_state
from ldm.start import Picture

PROMPT = "a red cat"
DDIM = Settings(sampler="ddim", spacing="trailing")


def pictures(count: int = 1, height: int = 32, width: int = 32) -> Tensor:
    """(B, 3, H, W) in [-1, 1]: smooth waves."""
    across = torch.linspace(0, 3, width)
    down = torch.linspace(0, 2, height)[:, None]
    return torch.stack(
        [torch.stack([torch.sin(across * (k + c + 1) + down * (2 - c)) for c in range(3)]) * 0.8 for k in range(count)]
    )


def latent(model: LatentDiffusion, start: Inverted, prompt: str | list[str] = PROMPT, **options) -> Tensor:
    """What drawing from `start` ends at."""
    return deque(model.sample(prompt, start=start, **options), maxlen=1).pop().x


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("settings", [
    Settings(cfg=7.5, steps=6),
    Settings(cfg=3.0, steps=5, spacing="karras", perp_negative=1.0),
    Settings(cfg=4.0, steps=4, spacing="leading", threshold="static"),
])  # fmt: skip
def test_an_exact_inversion_comes_back_at_any_guidance(tiny_model: LatentDiffusion, settings: Settings) -> None:
    images = pictures(3)
    start = tiny_model.invert(images, PROMPT, negative="a dog", exact=True, settings=settings)
    back = latent(tiny_model, start, [PROMPT] * 3, negative="a dog")
    schedule = tiny_model.law.schedule
    last = schedule.sigmas[0] if settings.spacing == "leading" else torch.tensor(0.0)  # where the grid ends
    wanted = tiny_model.codec.encode(images).double() / float(schedule.alpha(last))
    assert error(back, wanted) < 1e-6
    assert start.settings == settings.of(DrawingConfig()) and start.x.dtype == torch.float64
    again = tiny_model.txt2img([PROMPT] * 3, negative="a dog", start=start, batch_size=3)
    torch.testing.assert_close(again, tiny_model.img2img(images, PROMPT, strength=0), rtol=0, atol=1e-4)
    assert error(latent(tiny_model, start, ["a blue dog"] * 3), wanted) > 1e-2, "other words draw another picture"


@pytest.fixture(scope="module")
def icons() -> LatentDiffusion:
    return ldm.load("icons", device="cpu")


HEART = "a red heart, twemoji"


@pytest.mark.slow
def test_a_picture_of_the_shipped_models_comes_back(icons: LatentDiffusion) -> None:
    """Nearer by each refinement, and by the better method; half way up nearer still; exactly at cfg 7.5."""
    image = icons.txt2img(HEART, seed=3, steps=10, cfg=3)
    wanted = icons.codec.encode(image).double()

    def missed(settings: Settings, **options) -> float:
        return error(latent(icons, icons.invert(image, HEART, settings=settings, **options), HEART), wanted)

    how = Settings(cfg=1.0, steps=12, spacing="karras")
    by_ddim = missed(dataclasses.replace(how, sampler="ddim"), refinements=0)
    plain, once, twice = (missed(how, refinements=k) for k in range(3))
    assert 0.2 > by_ddim > 1.2 * plain > 1.8 * once > 2.2 * twice, (by_ddim, plain, once, twice)
    assert missed(Settings(cfg=7.5, steps=8, spacing="trailing"), exact=True) < 1e-3


@pytest.mark.slow
def test_a_null_text_leads_back_at_a_large_guidance(icons: LatentDiffusion) -> None:
    """Nearer than the same way without it; the model itself stays as it is, and other words draw another picture."""
    image = icons.txt2img(HEART, seed=3, steps=10, cfg=3)
    wanted, before = icons.codec.encode(image).double(), icons.txt2img(HEART, steps=2)
    nulled, start = null_text(icons, image, HEART, cfg=5, steps=10, iterations=5)
    found, without = (error(latent(model, start, HEART), wanted) for model in (nulled, icons))
    assert start.settings.cfg == 5 and found < 0.85 * without, (found, without)
    assert error(latent(nulled, start, "a blue heart, twemoji"), wanted) > 2 * found
    torch.testing.assert_close(icons.txt2img(HEART, steps=2), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "unipc", "plms"])
def test_every_deterministic_sampler_inverts(tiny_model: LatentDiffusion, sampler: str) -> None:
    start = tiny_model.invert(pictures(), PROMPT, sampler=sampler, steps=3)
    assert start.settings.sampler == sampler and bool(start.x.isfinite().all())
    assert tiny_model.txt2img(PROMPT, start=start).shape == (1, 3, 32, 32)


def test_half_way_up_is_where_a_picture_of_that_strength_begins(tiny_model: LatentDiffusion) -> None:
    start = tiny_model.invert(pictures(), PROMPT, strength=0.5, steps=6, exact=True)
    (first, *_) = tiny_model.sample(PROMPT, start=start)
    (whole, *_) = tiny_model.sample(PROMPT, steps=6)
    assert start.sigma == first.sigma < whole.sigma and first.total == 6
    assert error(latent(tiny_model, start), tiny_model.codec.encode(pictures()).double()) < 1e-6


def test_any_size_and_number(tiny_model: LatentDiffusion) -> None:
    """Sides that f does not divide are continued and cropped back; one picture serves several prompts; a batch is its
    pictures."""
    with pytest.warns(UserWarning, match="continued by its reflection"):
        how = Settings(cfg=1, steps=3, spacing="trailing")
        odd = tiny_model.invert(pictures(1, 30, 42), PROMPT, exact=True, settings=how)
    again = tiny_model.txt2img([PROMPT, "a blue dog"], start=odd)
    assert again.shape == (2, 3, 30, 42)
    with warnings.catch_warnings(action="ignore"):
        once = tiny_model.img2img(pictures(1, 30, 42), PROMPT, strength=0)
    torch.testing.assert_close(again[:1], once, rtol=0, atol=1e-3)
    images = pictures(3)
    together = tiny_model.invert(images, PROMPT, steps=3, batch_size=2)
    alone = tiny_model.invert(images[2:], PROMPT, steps=3)
    torch.testing.assert_close(together.x[2:], alone.x, rtol=0, atol=1e-3)
    drawn = tiny_model.txt2img([PROMPT] * 3, start=together, batch_size=2)
    torch.testing.assert_close(drawn[2:], tiny_model.txt2img(PROMPT, start=alone), rtol=0, atol=1e-3)


def test_settings_of_ones_own_go_before_the_starts(tiny_model: LatentDiffusion) -> None:
    start = tiny_model.invert(pictures(), PROMPT, steps=4)
    assert (start.settings.cfg, start.settings.steps, start.settings.sampler) == (1.0, 4, "dpmpp_2m")
    assert len(list(tiny_model.sample(PROMPT, start=start))) == 4
    assert len(list(tiny_model.sample(PROMPT, start=start, steps=6, sampler="ddim", cfg=2))) == 6
    assert len(list(tiny_model.sample(PROMPT, start=start, settings=Settings(steps=5)))) == 5


def test_values_of_ones_own_come_along(tiny_model: LatentDiffusion) -> None:
    """A sampler and a grid that have no name walk up, and down again unless others are said."""

    def even(schedule: object, steps: int) -> Tensor:
        return torch.linspace(5, 0, steps + 1)

    start = tiny_model.invert(pictures(), PROMPT, sampler=euler(), grid=even, steps=4)
    named = tiny_model.invert(pictures(), PROMPT, sampler="euler", grid=[5, 3.75, 2.5, 1.25, 0])
    torch.testing.assert_close(start.x, named.x)
    assert start.sigma == 5 and named.settings.sigmas == (5, 3.75, 2.5, 1.25, 0)
    torch.testing.assert_close(latent(tiny_model, start), latent(tiny_model, named))
    assert len(list(tiny_model.sample(PROMPT, start=start, grid=lambda *_: torch.tensor([5.0, 0.0])))) == 1
    with pytest.raises(UserError, match="inverted up to sigma 5"):
        tiny_model.txt2img(PROMPT, start=start, settings=Settings(steps=4))
    with pytest.raises(UserError, match="draws noise on its way"):
        tiny_model.invert(pictures(), PROMPT, sampler=euler_a())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": "euler_a"}, "draws noise on its way"),
        ({"settings": Settings(sampler="ddim", eta=0.5)}, "draws noise on its way"),
        ({"settings": Settings(sampler="heun", options={"s_churn": 4})}, "draws noise on its way"),
        ({"sampler": "ddpm"}, "draws noise on its way"),
        ({"sampler": "euler_maruyama"}, "draws noise on its way"),
        ({"refinements": -1}, "refinements were asked for"),
        ({"refinements": 21}, "refinements were asked for"),
        ({"refinements": 0.5}, "refinements"),
        ({"strength": 0}, "strength 0 stays where it is"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"exact": True, "sampler": "ddim"}, "sampler of its own"),
        ({"settings": Settings(width=64)}, "settings.width is 64"),
        ({"image": pictures() * 100}, "values from"),
        ({"image": pictures()[:, :1]}, "grey"),
        ({"image": pictures(1, 4, 4)}, "4 x 4 pixels"),
        ({"image": pictures(2), "prompt": ["a", "b", "c"]}, "2 pictures to begin from were given for 3 prompts"),
        ({"image": []}, "empty list"),
    ],
)
def test_what_cannot_be_inverted_is_refused(tiny_model: LatentDiffusion, options: dict, said: str) -> None:
    image, prompt = options.get("image", pictures()), options.get("prompt", PROMPT)
    rest = {name: value for name, value in options.items() if name not in ("image", "prompt")}
    with pytest.raises(UserError, match=said):
        tiny_model.invert(image, prompt, **rest)


def test_a_start_that_does_not_fit_is_refused(tiny_model: LatentDiffusion) -> None:
    start = tiny_model.invert(pictures(2), PROMPT, steps=3)
    with pytest.raises(UserError, match="2 pictures to begin from were given for 3 prompts"):
        tiny_model.txt2img([PROMPT] * 3, start=start)
    with pytest.raises(UserError, match="inverted up to sigma"):
        tiny_model.txt2img([PROMPT] * 2, start=start, settings=Settings(spacing="leading"))
    with pytest.raises(UserError, match=r"settings\.height is 64"):
        tiny_model.txt2img([PROMPT] * 2, start=start, settings=Settings(height=64))
    with pytest.raises(UserError, match=r"give what model\.invert found"):
        tiny_model.txt2img(PROMPT, start=pictures())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a start and a noise"):
        tiny_model.txt2img([PROMPT] * 2, start=start, noise=torch.zeros(2, 4, 8, 8))
    exact = tiny_model.invert(pictures(), PROMPT, steps=1, exact=True)
    with pytest.raises(UserError, match="a sampler of its own"):
        tiny_model.txt2img(PROMPT, start=exact, sampler="ddim")
    with pytest.raises(UserError, match="settings is 7"):
        tiny_model.txt2img(PROMPT, settings=7)  # type: ignore[arg-type]


# ---------------------------------------------------------------- null text


def test_a_null_text_is_told_of_its_levels_alone(tiny_model: LatentDiffusion) -> None:
    """Without an iteration it is the empty prompt's own; a negative prompt stands where it would; several prompts may
    start from one picture; and the first steps come nearer to the way up than without."""
    same, start = null_text(tiny_model, pictures(), PROMPT, cfg=6, steps=4, iterations=0)
    usual = tiny_model.txt2img([PROMPT, "a blue dog"], start=start)
    torch.testing.assert_close(same.txt2img([PROMPT, "a blue dog"], start=start), usual, rtol=0, atol=1e-4)
    weighted = dataclasses.replace(start.settings, prompt_syntax="weighted")
    long = [PROMPT, "a (blue:1.2) dog, " * 20]  # of several chunks: the empty prompt is padded beside it
    torch.testing.assert_close(
        same.txt2img(long, start=start, settings=weighted),
        tiny_model.txt2img(long, start=start, settings=weighted),
        rtol=0,
        atol=1e-4,
    )
    nulled, start = null_text(tiny_model, pictures(), PROMPT, cfg=6, steps=4, iterations=20)
    assert not torch.allclose(nulled.txt2img(PROMPT, start=start), usual[:1], rtol=0, atol=1e-2)
    options = {"negative": "a dog", "cfg": 6, "steps": 4, "settings": DDIM}
    given = nulled.txt2img(PROMPT, **options)
    torch.testing.assert_close(given, tiny_model.txt2img(PROMPT, **options), rtol=0, atol=1e-4)
    up = tiny_model.invert(pictures(), PROMPT, cfg=1, steps=4, settings=DDIM, refinements=0)
    assert torch.equal(up.x, start.x)
    (lower, *_) = rise_of(tiny_model, steps=4)
    first, plain = (next(iter(model.sample(PROMPT, start=start))).x for model in (nulled, tiny_model))
    assert error(first, lower) < 0.8 * error(plain, lower)


def rise_of(model: LatentDiffusion, steps: int) -> list[Tensor]:
    """The states on the way up by ddim at cfg 1, from the second level down."""
    plan = dataclasses.replace(DDIM, cfg=1, steps=steps).plan()
    sigmas = generate.make_sigmas(model, plan)
    denoiser, x = of_picture(model, of_prompts(PROMPT), plan, NONE, Picture(pictures()), sigmas)
    with torch.no_grad():
        return [step.x for step in rise(ddim(), denoiser, x, sigmas)][-2::-1]


def test_what_null_text_does_not_take_is_refused(tiny_model: LatentDiffusion) -> None:
    for settings in (
        Settings(sampler="heun"),
        Settings(sampler="ddim", eta=0.3),
        Settings(perp_negative=1.0),
        Settings(threshold="static"),
        Settings(sampler="ddim", reuse=2),
    ):
        with pytest.raises(UserError, match="ddim with eta 0"):
            null_text(tiny_model, pictures(), PROMPT, settings=settings)
    with pytest.raises(UserError, match="iterations were asked for"):
        null_text(tiny_model, pictures(), PROMPT, iterations=-1)
    with pytest.raises(UserError, match="2 pictures to begin from"):
        null_text(tiny_model, pictures(2), PROMPT)


def test_the_network_is_on_the_models_device_for_as_long_as_a_null_text_is_sought(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = 0

    @contextmanager
    def visiting(model: LatentDiffusion, *networks: object) -> Iterator[None]:
        nonlocal there
        there += model.unet in networks
        yield
        there -= model.unet in networks

    def called(*_: object) -> None:
        assert there == 1

    monkeypatch.setattr("ldm.null_text.visiting", visiting)
    hook = tiny_model.unet.register_forward_pre_hook(called)
    try:
        null_text(tiny_model, pictures(), PROMPT, cfg=6, steps=2, iterations=2)
    finally:
        hook.remove()
    assert there == 0


def test_an_inverted_picture_goes_to_a_device_without_float64_in_float32() -> None:
    """Cast before it is moved; there is none here, so what is asked of the tensor is looked at."""

    class Asked:
        device, asked = torch.device("cpu"), []

        def to(self, what: object) -> Asked:
            self.asked.append(what)
            return self

    solver_state(cast(Tensor, Asked()), torch.device("mps"))
    assert Asked.asked == [torch.float32, torch.device("mps")]
