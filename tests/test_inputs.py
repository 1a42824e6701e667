"""What the library is given: what is plainly meant is drawn as if it had been given plainly, the rest is a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import generate, pictures
from ldm.api import LatentDiffusion, load
from ldm.errors import UserError
from ldm.inputs import as_depths, as_images, as_masks
from ldm.jobs import Request, Settings, of_prompts
from ldm.start import Picture

LEVELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
IMAGE = torch.from_numpy(LEVELS).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, 4, 6)


def forms(folder: Path) -> dict[str, Any]:
    """The picture `IMAGE`, given in every way."""
    picture = Image.fromarray(LEVELS)
    picture.save(folder / "a.png")
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    turned.save(folder / "turned.png", exif=exif)
    return {
        "float32": IMAGE,
        "float64": IMAGE.double(),
        "without its batch": IMAGE[0],
        "with a gradient": IMAGE.clone().requires_grad_(),
        "uint8": ((IMAGE + 1) * 127.5).round().byte(),
        "array": LEVELS,
        "arrays": LEVELS[None],
        "an array back to front": LEVELS[:, ::-1][:, ::-1],
        "Pillow": picture,
        "with alpha": picture.convert("RGBA"),
        "turned": Image.open(folder / "turned.png"),
        "path": folder / "a.png",
        "name": str(folder / "turned.png"),
        "list": [picture],
        "tuple": (IMAGE,),
    }


def test_every_form_of_a_picture(tmp_path: Path) -> None:
    for name, given in forms(tmp_path).items():
        made = as_images(given)
        assert made.shape == (1, 3, 4, 6) and made.dtype == torch.float32 and not made.requires_grad, name
        torch.testing.assert_close(made, IMAGE, rtol=0, atol=1e-6, msg=name)
    both = as_images([tmp_path / "a.png", LEVELS, IMAGE.repeat(2, 1, 1, 1)])
    assert torch.equal(both, IMAGE.repeat(4, 1, 1, 1))
    half = IMAGE.bfloat16()
    assert torch.equal(as_images(half), half.float())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(1, 1, 4, 4), "(1, 1, 4, 4) (grey)"),
        (torch.zeros(4, 4, 4), "(1, 4, 4, 4) (alpha?)"),
        (torch.zeros(4, 4), "(4, 4)"),
        (torch.zeros(4, 4, 3), "(B, 3, H, W)"),
        (torch.zeros(0, 3, 4, 4), "(0, 3, 4, 4)"),
        (torch.zeros(1, 3, 0, 4), "(1, 3, 0, 4)"),
        (torch.full((1, 3, 4, 4), torch.nan), "not finite"),
        (torch.full((1, 3, 4, 4), 255.0), "from 255 to 255; floats are in [-1, 1]"),
        (torch.full((1, 3, 4, 4), -1.1), "from -1.1"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.long), "torch.int64; give uint8"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.bool), "torch.bool"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.complex64), "torch.complex64"),
        (np.zeros((4, 4, 3)), "(4, 4, 3) of float64"),
        (np.zeros((4, 4), np.uint8), "(4, 4) of uint8"),
        (np.zeros((4, 4, 4), np.uint8), "(4, 4, 4) of uint8"),
        (np.array([["a"]]), "array (1, 1)"),
        (Image.new("F", (4, 4)), "floating-point pixels"),
        ("missing.png", "no picture missing.png"),
        (None, "NoneType"),
        (b"bytes", "bytes"),
        (7, "int"),
        ([], "an empty list of pictures"),
        ([IMAGE, IMAGE[..., :3]], "3 x 4, 6 x 4"),
        ([IMAGE, None], "NoneType"),
    ],
)
def test_pictures_that_are_none(given: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        as_images(given)
    assert words in str(error.value)


AREA = np.zeros((4, 6), bool)
AREA[:, :3] = True


def test_every_form_of_a_mask(tmp_path: Path) -> None:
    expected = torch.from_numpy(AREA)[None, None].float()
    picture = Image.fromarray(AREA.astype(np.uint8) * 255)
    picture.save(tmp_path / "a.png")
    for given in (
        expected,
        expected[0],
        expected[0, 0],
        expected.bool(),
        expected.long(),
        expected.double(),
        (expected * 255).byte(),
        expected.byte(),
        AREA,
        AREA[..., None],
        AREA[None],
        AREA[None, None],
        AREA.astype(np.uint8) * 255,
        AREA.astype(np.float64),
        picture,
        picture.convert("1"),
        picture.convert("RGB"),
        picture.convert("RGBA"),
        picture.convert("P"),
        picture.convert("I;16").point(lambda level: level * 257),
        tmp_path / "a.png",
        [picture],
    ):
        made = as_masks(given, IMAGE)
        assert made.dtype == torch.float32 and torch.equal(made, expected), given
    two = IMAGE.repeat(2, 1, 1, 1)
    for given in (AREA, [picture], [AREA, AREA], expected, expected.repeat(2, 1, 1, 1), np.stack([AREA, AREA])):
        assert torch.equal(as_masks(given, two), expected.repeat(2, 1, 1, 1))
    assert as_masks(Image.new("L", (6, 4), 51), IMAGE).unique().tolist() == pytest.approx([0.2])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.ones(1, 1, 4, 4), "asks for (1, 1, 4, 6)"),
        (torch.ones(1, 3, 4, 6), "the mask is (1, 3, 4, 6)"),
        (torch.ones(2, 1, 4, 6), "the mask is (2, 1, 4, 6)"),
        (torch.ones(()), "the mask is ()"),
        (torch.full((4, 6), 255.0), "from 255 to 255; floats are in [0, 1]"),
        (torch.full((4, 6), -1.0), "from -1 to -1"),
        (torch.full((4, 6), 255), "from 255 to 255"),
        (torch.full((4, 6), torch.nan), "no finite numbers"),
        (torch.ones(4, 6, dtype=torch.complex64), "no finite numbers"),
        (np.full((4, 6), "a"), "the mask is an array of <U1"),
        (Image.new("L", (4, 4)), "the mask is (1, 1, 4, 4)"),
        (Image.new("RGBA", (6, 4), (255, 255, 255, 0)), "transparent parts"),
        (Image.new("LA", (6, 4), (255, 9)), "transparent parts"),
        ("missing.png", "no picture missing.png"),
        (True, "the type bool"),
        ([], "an empty list of masks"),
        ([[0, 1]], "the type int"),
    ],
)
def test_masks_that_are_none(given: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        as_masks(given, IMAGE)
    assert words in str(error.value)


def test_depth_maps_are_of_any_size_and_scale() -> None:
    ramp = np.arange(6, dtype=np.float64).reshape(2, 3)
    for given in (ramp, torch.from_numpy(ramp), torch.from_numpy(ramp)[None, None], [ramp], ramp.astype(np.int64)):
        assert torch.equal(as_depths(given, 2), torch.from_numpy(ramp)[None, None].float().expand(2, 1, 2, 3))
    assert as_depths([Image.new("L", (3, 2), 9), Image.new("L", (3, 2), 99)], 2).shape == (2, 1, 2, 3)
    for wrong in (ramp[0], np.stack([ramp] * 3), torch.full((2, 3), torch.inf), np.zeros((0, 3)), [], "missing.png", 3):
        with pytest.raises(UserError, match=r"depth map|no picture"):
            as_depths(wrong, 2)  # type: ignore[arg-type]


def test_a_depth_map_for_a_model_that_takes_none(tiny_model: LatentDiffusion) -> None:
    with pytest.raises(UserError, match="takes no depth map; leave it out"):
        tiny_model.img2img(torch.zeros(3, 32, 32), "a cat", depth=np.ones((8, 8)), steps=2)


def test_img2img_draws_the_same_of_every_form(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    image = (torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).round() / 127.5 - 1
    levels = ((image[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(tmp_path / "a.png")
    area = np.zeros((32, 32), bool)
    area[:, :16] = True
    mask = torch.from_numpy(area)[None, None].float()

    def draw(image: Any, mask: Any = mask, prompt: Any = "a cat", seed: Any = 0) -> torch.Tensor:
        return tiny_model.img2img(image, prompt, mask=mask, strength=0.5, steps=2, cfg=1, seed=seed)

    expected = draw(image)
    for one, other in ((levels, area), (tmp_path / "a.png", Image.fromarray(area)), (image[0], (mask * 255).byte())):
        torch.testing.assert_close(draw(one, other), expected, rtol=0, atol=1e-4)
    several = draw(image, prompt=["a cat", "a dog"], seed=[0, 9])  # one picture and one mask serve both
    torch.testing.assert_close(several[:1], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(several[1:], draw([levels], prompt=["a dog"], seed=9), rtol=0, atol=1e-4)

    for name in ("width", "height"):
        given = dataclasses.replace(Settings(steps=2, cfg=1), **{name: 32})
        assert tiny_model.img2img(levels, "a cat", settings=given).shape == (1, 3, 32, 32)
        with pytest.raises(UserError, match=f"settings.{name} is 64, and the picture to begin from is 32 x 32"):
            tiny_model.img2img(levels, "a cat", settings=dataclasses.replace(given, **{name: 64}))


def test_a_beginning_is_in_the_one_form(tiny_model: LatentDiffusion) -> None:
    for image, mask, strength in (
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), None, 0.5),
        (torch.zeros(1, 3, 4, 4), torch.full((1, 1, 4, 4), 255.0), 0.5),
        (torch.zeros(1, 3, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool), 0.5),
        (torch.zeros(1, 3, 4, 4), None, "half"),
    ):
        with pytest.raises(UserError):
            Picture(image, strength, mask)  # type: ignore[arg-type]
    begin = Picture(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="height is 64"):
        next(generate.sample(tiny_model, [Request("a cat")], Settings(height=64).plan(), start=begin))


# ---------------------------------------------------------------- prompts, seeds, counts


def test_a_seed_for_each_picture_and_a_negative_for_each_prompt() -> None:
    expected = [Request("a", "x", 9), Request("a", "x", 3), Request("b", "y", 9), Request("b", "y", 0)]
    for seeds in ([9, 3, 9, 0], (9, 3, 9, 0), np.array([9, 3, 9, 0]), torch.tensor([9, 3, 9, 0])):
        made = of_prompts(["a", "b"], ["x", "y"], seeds, n=2)  # type: ignore[arg-type]
        assert made == expected and all(type(request.seed) is int for request in made)
    assert of_prompts(("a", "b"), seed=range(5, 7)) == [Request("a", "", 5), Request("b", "", 6)]
    for one in (np.int64(7), torch.tensor(7), np.array(7)):
        assert of_prompts("a", seed=one, n=2) == [Request("a", "", 7), Request("a", "", 8)]  # type: ignore[arg-type]


def test_they_draw_what_each_would_draw_alone(tiny_model: LatentDiffusion) -> None:
    both = tiny_model.txt2img(["a cat", "a dog"], negative=["red", "blue"], seed=[5, 3], steps=2)
    for i, (prompt, negative, seed) in enumerate((("a cat", "red", 5), ("a dog", "blue", 3))):
        alone = tiny_model.txt2img(prompt, negative=negative, seed=seed, steps=2)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-3)
    assert [step.x.shape[0] for step in tiny_model.sample(["a", "b"], seed=[1, 2], steps=1)] == [2]


CALLS: dict[str, tuple[Callable[[LatentDiffusion], object], str]] = {
    "no prompts": (lambda m: m.txt2img([]), "an empty list of prompts"),
    "no prompts, step by step": (lambda m: m.sample([]), "an empty list of prompts"),
    "no prompts for a picture": (lambda m: m.img2img(torch.zeros(3, 32, 32), []), "an empty list of prompts"),
    "None": (lambda m: m.txt2img(None), "the prompt is None"),  # type: ignore[arg-type]
    "bytes": (lambda m: m.txt2img(b"a cat"), "the prompt is b'a cat'"),  # type: ignore[arg-type]
    "numbers": (lambda m: m.txt2img([1, 2]), r"the prompt is \[1, 2\]"),  # type: ignore[list-item]
    "no negative": (lambda m: m.txt2img("a", negative=None), "the negative prompt is None"),  # type: ignore[arg-type]
    "negatives": (lambda m: m.txt2img("a", negative=["a", "b"]), "2 negative prompts were given for 1 prompts"),
    "seeds": (lambda m: m.txt2img("a", seed=[1, 2]), "2 seeds were given for 1 pictures"),
    "no seed": (lambda m: m.txt2img("a", seed=None), "the seed is None"),  # type: ignore[arg-type]
    "a text": (lambda m: m.txt2img("a", seed="7"), "the seed is '7'"),  # type: ignore[arg-type]
    "half a seed": (lambda m: m.txt2img("a", seed=[0.5]), "a seed is 0.5"),  # type: ignore[list-item]
    "a long seed": (lambda m: m.txt2img("a", seed=10**20), "out of range"),
    "n": (lambda m: m.txt2img("a", n=2.5), "n is 2.5"),  # type: ignore[arg-type]
    "a batch of none": (lambda m: m.txt2img("a", batch_size=0), "a batch of 0"),
    "a batch of texts": (lambda m: m.txt2img("a", batch_size="4"), "the batch size is '4'"),  # type: ignore[arg-type]
    "cfg": (lambda m: m.txt2img("a", cfg="7"), "cfg is '7', which is not a number"),  # type: ignore[arg-type]
    "steps": (lambda m: m.txt2img("a", steps=2.5), "steps is 2.5, which is not a whole"),  # type: ignore[arg-type]
    "sampler": (lambda m: m.txt2img("a", sampler=3), "sampler is 3, which is not a text"),  # type: ignore[arg-type]
    "strength": (lambda m: m.img2img(torch.zeros(3, 32, 32), "a", strength=torch.nan), "one of the strengths is nan"),
    "not a step": (lambda m: m.decode(torch.zeros(1, 4, 8, 8)), "got a Tensor"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", CALLS)
def test_what_is_no_request(tiny_model: LatentDiffusion, what: str) -> None:
    call, words = CALLS[what]
    with pytest.raises(UserError, match=words):
        made = call(tiny_model)
        next(made)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigmas": 5.0}, "sigmas is 5.0, which is not a list"),
        ({"sigmas": ("a",)}, "a number of sigmas is 'a'"),
        ({"sigmas": (1.0, 2.0, 0.0)}, "from 1 to 2"),
        ({"sigmas": (1.0,)}, "1 levels"),
        ({"cfg_interval": (1.0,)}, "give low and high"),
        ({"options": ["eta"]}, "give each by its name"),
        ({"width": 64.0}, "width is 64.0"),
        ({"eta": True}, "eta is True"),
        ({"cfg_rescale": None}, "cfg_rescale is None"),
    ],
)
def test_settings_of_other_types(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Settings(**changes).check()


def test_settings_become_plain() -> None:
    given = Settings(
        cfg=np.float32(7.5),  # type: ignore[arg-type]
        steps=np.int64(2),  # type: ignore[arg-type]
        cfg_interval=[0, 5],  # type: ignore[arg-type]
        sigmas=np.array([3.0, 1.0, 0.0]),  # type: ignore[arg-type]
        guide_model=Path("worse"),  # type: ignore[arg-type]
    ).check()
    assert (given.cfg, given.steps, given.cfg_interval, given.guide_model) == (7.5, 2, (0, 5), "worse")
    assert given.sigmas == (3.0, 1.0, 0.0) and {type(given.cfg), type(given.sigmas[0])} == {float}
    assert given.check() == given
    assert Settings(sigmas=torch.tensor([3.0, 0.0])).check().sigmas == (3.0, 0.0)  # type: ignore[arg-type]


def test_what_is_no_settings_and_no_model_is_told(tiny_model: LatentDiffusion) -> None:
    for settings in (7, {}, {"cfg": 3}):
        with pytest.raises(UserError, match="give a ldm"):
            tiny_model.txt2img("a cat", settings=settings)  # type: ignore[arg-type]
    for model in (None, 5, "", " "):
        with pytest.raises(UserError, match="a model is named by a text or a path"):
            load(model)  # type: ignore[arg-type]
