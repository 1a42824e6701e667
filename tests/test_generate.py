"""The path of sampling: what is evaluated and how often, what a picture depends on, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_parts
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm import generate, jobs, provenance
from ldm.api import LatentDiffusion, PromptNotice, assemble, load
from ldm.autoencoder.codec import Codec
from ldm.checkpoints import native
from ldm.config import AutoencoderConfig, EncoderConfig
from ldm.errors import UserError
from ldm.helpers import open_helpers
from ldm.image_io import save_png
from ldm.jobs import Ask, Request, Settings
from ldm.start import Picture
from ldm.unet import UNet

FAST = Settings(steps=4, cfg=3.0)


def draw(model: LatentDiffusion, requests: list[Request], batch_size: int = 4, **changes: Any) -> Tensor:
    plan = dataclasses.replace(FAST, **changes).plan()
    return generate.draw(model, requests, plan, open_helpers(model, plan), batch_size)


def spied(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, note: Callable[..., Any]) -> list[Any]:
    """Calls of `target.name`, each as `note(*arguments)`."""
    notes, original = [], getattr(target, name)

    def spy(*arguments: Any) -> Any:
        notes.append(note(*arguments))
        return original(*arguments)

    monkeypatch.setattr(target, name, spy)
    return notes


# ---------------------------------------------------------------- against an independent loop


def test_it_is_ddim_with_guidance(tiny_model: LatentDiffusion) -> None:
    """Song et al. 2021, equation 12 with eta = 0, on z = alpha x in float64, for a v-network (Salimans & Ho 2022)."""
    scale, steps = 3.0, 5
    cosine_squared = tiny_model.law.schedule.alphas_cumprod
    times = [round(100 - i * 100 / steps) - 1 for i in range(steps)]
    with torch.no_grad():
        both = torch.cat([tiny_model.text.encode(["a red heart"]), tiny_model.text.encode(["blue"])])
        z = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5)).double()
        for i, t in enumerate(times):
            a, s = cosine_squared[t].sqrt(), (1 - cosine_squared[t]).sqrt()
            v = tiny_model.unet(z.float().repeat(2, 1, 1, 1), torch.full((2,), float(t)), both).double()
            v = v[1:] + scale * (v[:1] - v[1:])
            x0, eps = a * z - s * v, s * z + a * v
            following = cosine_squared[times[i + 1]] if i + 1 < steps else torch.ones(())
            z = following.sqrt() * x0 + (1 - following).sqrt() * eps
        expected = tiny_model.codec.decode(z.float())
    how = {"sampler": "ddim", "spacing": "trailing", "cfg": scale, "steps": steps}
    drawn = draw(tiny_model, [Request("a red heart", "blue", 5)], **how)
    assert float((drawn - expected).abs().max()) < 1e-3
    assert float(drawn.std()) > 0.1


# ---------------------------------------------------------------- what a picture depends on


def test_a_picture_does_not_depend_on_its_batch(tiny_model: LatentDiffusion) -> None:
    requests = [Request("a cat", "", 3), Request("a red heart", "blue", 4), Request("a cat", "dog", 5)]
    for changes in ({}, {"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.7, "spacing": "linspace"}):
        together = draw(tiny_model, requests, batch_size=3, **changes)
        alone = draw(tiny_model, requests, batch_size=1, **changes)
        turned = draw(tiny_model, requests[::-1], batch_size=2, **changes).flip(0)
        assert float((together - alone).abs().max()) < 1e-3 and float((together - turned).abs().max()) < 1e-3
        copies = [draw(tiny_model, [request] * 3, batch_size=3, **changes)[i] for i, request in enumerate(requests)]
        assert torch.equal(torch.stack(copies), together)  # bit for bit in a batch of the same size


def test_what_it_does_depend_on(tiny_model: LatentDiffusion) -> None:
    base = draw(tiny_model, [Request("a red heart", "", 1)])
    assert torch.equal(base, draw(tiny_model, [Request("a red heart", "", 1)]))
    for request in (Request("a cat", "", 1), Request("a red heart", "blue", 1), Request("a red heart", "", 2)):
        assert float((draw(tiny_model, [request]) - base).abs().max()) > 1e-3
    for changes in (
        {"cfg": 1.0},
        {"sampler": "ddpm"},
        {"sampler": "ddim", "eta": 1.0},
        {"cfg_rescale": 0.7},
        {"cfg_interval": (0.5, 2.0)},
    ):
        assert float((draw(tiny_model, [Request("a red heart", "", 1)], **changes) - base).abs().max()) > 1e-3


def test_seeds_count_up_over_the_pictures(tiny_model: LatentDiffusion) -> None:
    images = tiny_model.txt2img(["a cat", "a red heart"], n=2, seed=7, steps=2, batch_size=4)
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32
    single = tiny_model.txt2img("a red heart", seed=10, steps=2)
    assert float((single[0] - images[3]).abs().max()) < 1e-3


def test_tiles(tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder sees pieces of the tile's size; one tile as large as the picture is the picture."""
    assert torch.equal(draw(tiny_model, [Request("a cat")], tile=32), draw(tiny_model, [Request("a cat")]))
    autoencoder = tiny_model.codec.autoencoder
    assert autoencoder is not None
    decoded = spied(monkeypatch, autoencoder, "decode", lambda z: tuple(z.shape[2:]))
    tiled = draw(tiny_model, [Request("a cat")], tile=16, width=40)
    assert tiled.shape == (1, 3, 32, 40) and set(decoded) == {(4, 4)} and len(decoded) > 1
    encoded = spied(monkeypatch, autoencoder, "encode", lambda image: tuple(image.shape[2:]))
    tiny_model.img2img(tiled, "a dog", strength=0.5, settings=dataclasses.replace(FAST, tile=16))
    assert set(encoded) == {(16, 16)}
    for tile in (2, 18):
        with pytest.raises(UserError, match=f"a tile of {tile} pixels"):
            next(generate.sample(tiny_model, [Request("a cat")], Settings(tile=tile).plan()))


def test_a_picture_that_does_not_fit_into_memory(tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: object) -> None:
        torch.empty(1 << 58, dtype=torch.uint8)  # more than any machine has: the CPU's allocator refuses it

    monkeypatch.setattr(tiny_model.unet, "forward", unable)
    with pytest.raises(UserError, match="memory does not suffice for 2 pictures"):
        draw(tiny_model, [Request("a cat")] * 2)


def test_sizes(tiny_model: LatentDiffusion) -> None:
    assert draw(tiny_model, [Request("a cat")], width=44, height=20).shape == (1, 3, 20, 44)


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, [4] * 4),  # conditional and unconditional in one batch
        ({"cfg": 1.0}, [2] * 4),  # the conditional model alone
        ({"cfg_interval": (0.0, 2.0)}, [2, 2, 4, 4]),
        ({"cfg": 1.0, "sampler": "ddpm"}, [2] * 4),
    ],
)
def test_evaluations(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], rows: list[int]
) -> None:
    evaluated = spied(monkeypatch, tiny_model.unet, "forward", lambda x, t, told: len(x))
    projected = spied(monkeypatch, tiny_model.unet, "prepare", len)
    read = spied(monkeypatch, tiny_model.text, "tokenize", list)
    draw(tiny_model, [Request("a cat", "dog"), Request("a cat", "dog", 1)], **changes)
    assert evaluated == rows
    assert sorted(projected) == sorted(set(rows))  # once for a trajectory, not for each step
    assert read == ([["a cat"]] if changes.get("cfg") == 1.0 else [["a cat"], ["dog"]])


def test_the_loop_can_be_taken_apart(tiny_model: LatentDiffusion) -> None:
    steps = list(tiny_model.sample("a cat", seed=3, n=2, steps=4))
    assert [step.index for step in steps] == [0, 1, 2, 3] and steps[-1].sigma_next == 0
    assert all(step.x.shape == step.x0.shape == (2, 4, 8, 8) for step in steps)
    assert torch.equal(tiny_model.decode(steps[-1]), tiny_model.txt2img("a cat", seed=3, n=2, steps=4))
    for step in tiny_model.sample("a cat", steps=50):
        assert torch.is_grad_enabled()  # sampling does not leak its mode into the caller's loop
        step.x.mul_(0)  # nor hand out tensors that may not be changed
        break
    leading = list(tiny_model.sample("a cat", steps=4, settings=Settings(spacing="leading")))
    assert leading[-1].sigma_next > 0 and bool(tiny_model.decode(leading[-1]).isfinite().all())


# ---------------------------------------------------------------- what is told and refused


def test_words_that_are_not_read_are_named(tiny_model: LatentDiffusion) -> None:
    prompt = "a b c d e f g h i j k l m n o p"
    with pytest.warns(PromptNotice, match="dropped: o p"):
        cut = tiny_model.txt2img(prompt, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_model.txt2img("a cat", steps=2)
    notices = generate.prompt_notices(tiny_model, [Request(prompt), Request("a cat", prompt), Request(prompt)])
    assert len(notices) == 1 and "dropped: o p" in notices[0]
    assert bool(cut.isfinite().all())


def test_words_that_the_model_does_not_know_are_named(tiny_model: LatentDiffusion) -> None:
    requests = [Request("a zebra, a\x1b giraffe", "Zebra"), Request("a cat", "a dog"), Request("a zebra")]
    (notice,) = generate.prompt_notices(tiny_model, requests)
    assert "does not know 'zebra', " in notice and "'giraffe': it takes all such words for one" in notice
    assert notice.isprintable()
    with pytest.warns(PromptNotice, match="does not know 'zebra': it takes"):
        tiny_model.txt2img("a zebra", cfg=1, steps=1)
    with pytest.warns(PromptNotice, match="does not know 'zebra': it takes"):
        next(tiny_model.sample("a cat", negative="a zebra", steps=1))
    many = [Request(f"zebra{letter}") for letter in "abcdefghijklmn"]
    assert "'zebral' and 2 more: it" in generate.prompt_notices(tiny_model, many)[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "0 steps"),
        ({"steps": 101, "spacing": "trailing"}, "between 1 and 100"),
        ({"sampler": "ddmp"}, "did you mean 'ddpm'"),
        ({"width": 33}, "multiples of 4"),
        ({"sampler": "ddpm", "eta": 0.5}, "no option 'eta'"),
        ({"sampler": "ddim", "eta": 5.0}, "this grid admits"),
    ],
)
def test_settings_that_this_model_cannot_follow(
    tiny_model: LatentDiffusion, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as error:
        draw(tiny_model, [Request("a cat")], **changes)
    assert words in str(error.value)


def broken(model: LatentDiffusion, part: str) -> LatentDiffusion:
    """`model` with a NaN among the weights of `part`."""
    codec, unet = copy.deepcopy(model.codec), copy.deepcopy(model.unet)
    assert codec.autoencoder is not None
    weight = codec.autoencoder.decoder.last_layer.weight if part == "decoder" else unet.conv_in.weight
    weight[0, 0, 0, 0] = torch.nan
    return dataclasses.replace(model, codec=codec, unet=unet)


@pytest.mark.parametrize("part", ["unet", "decoder"])
def test_nan_is_an_error_and_never_a_picture(tiny_model: LatentDiffusion, part: str) -> None:
    with pytest.raises(UserError, match="not finite"):
        draw(broken(tiny_model, part), [Request("a cat")])


def test_a_decoder_that_overflows_in_half_precision_runs_in_float32(tiny_checkpoint: Path) -> None:
    half = load(tiny_checkpoint, "cpu", "fp16")
    assert half.precision == torch.float16 and half.codec.autoencoder is not None
    last = half.codec.autoencoder.decoder.last_layer
    last.weight.fill_(60_000.0)  # sums of these pass 65,504, the largest float16
    step = next(half.sample("a cat", steps=1))
    expected = copy.deepcopy(half.codec).to(dtype=torch.float32).decode(step.x.float())
    decoded = half.decode(step)
    assert bool(decoded.isfinite().all()) and torch.equal(decoded, expected)


def test_half_precision_agrees(tiny_model: LatentDiffusion, tiny_checkpoint: Path) -> None:
    for precision, tolerance in (("fp16", 0.03), ("bf16", 0.3)):
        image = draw(load(tiny_checkpoint, "cpu", precision), [Request("a cat")])
        assert float((image - draw(tiny_model, [Request("a cat")])).abs().max()) < tolerance


def test_a_pixel_model(tiny_model: LatentDiffusion) -> None:
    """The identity codec: everything downstream of it works on pixels, and nothing else changes."""
    autoencoder = AutoencoderConfig(kind="identity", scale=(1.0,))
    assert tiny_model.config.unet
    config = dataclasses.replace(
        tiny_model.config,
        autoencoder=autoencoder,
        unet=dataclasses.replace(tiny_model.config.unet, in_channels=3, out_channels=3),
        image_size=16,
    )
    assert config.unet
    pixels = assemble(config, Codec(None, autoencoder), tiny_model.towers, UNet(config.unet).requires_grad_(False))
    assert draw(pixels, [Request("a cat")]).shape == (1, 3, 16, 16)
    assert len(pixels.hash) == 64


@pytest.mark.gpu
def test_a_gpu_draws_the_same_picture(
    tiny_model: LatentDiffusion, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise is the CPU's, so pictures agree to rounding, and bit for bit with themselves."""
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)  # whose rounding is that of half precision
    requests = [Request("a cat", "", 3), Request("a red heart", "blue", 4)]
    for precision, tolerance in (("fp32", 0.01), ("fp16", 0.05)):
        model = load(tiny_checkpoint, "cuda", precision)
        image = draw(model, requests, sampler="ddpm")
        assert float((image - draw(tiny_model, requests, sampler="ddpm")).abs().max()) < tolerance
        assert torch.equal(image, draw(model, requests, sampler="ddpm"))


def test_parts_that_do_not_fit(tiny_model: LatentDiffusion) -> None:
    m = tiny_model
    narrow = copy.copy(m.text)
    narrow.config = dataclasses.replace(m.text.config, width=64)
    with pytest.raises(UserError, match="64 wide"):
        assemble(m.config, m.codec, {"text": narrow}, m.unet)
    with pytest.raises(UserError, match="zero_terminal_snr"):
        assert m.config.schedule
        schedule = dataclasses.replace(m.config.schedule, zero_terminal_snr=True)
        assemble(dataclasses.replace(m.config, schedule=schedule, parameterization="eps"), m.codec, m.towers, m.unet)


def told_more(m: LatentDiffusion, encoder: EncoderConfig = EncoderConfig(), **changes: int) -> LatentDiffusion:
    """The model with a random U-Net that is told, or takes, something else beside the caption."""
    assert m.config.unet
    config = dataclasses.replace(m.config.unet, **changes)
    torch.manual_seed(0)
    unet = UNet(config)
    for parameter in unet.parameters():
        if not bool(parameter.detach().any()):
            torch.nn.init.normal_(parameter, std=0.1)
    text = m.towers if config.context_width else {}
    model = dataclasses.replace(m.config, unet=config, encoder=encoder)
    return assemble(model, m.codec, text, unet.eval().requires_grad_(False))


def test_a_class_is_drawn_by_its_name_and_guided_from_the_null_class(tiny_model: LatentDiffusion) -> None:
    model = told_more(tiny_model, EncoderConfig(labels=("cat", "dog", "hen")), classes=3, context_width=0)

    def of(label: str | int | None, cfg: float) -> Tensor:
        return draw(model, [Request("", label=label)], cfg=cfg)

    cat, dog, none = (of(label, 1.0) for label in ("cat", "dog", None))
    assert not torch.equal(cat, dog) and not torch.equal(cat, none)
    assert (
        float((of("cat", 0.0) - none).abs().mean()) < 1e-3 < float((cat - none).abs().mean())
    )  # guidance scale 0 is the null class alone
    with pytest.raises(UserError, match="there is no label 'cow'; this model knows cat, dog, hen"):
        of("cow", 1.0)
    with pytest.raises(UserError, match="this model knows no labels"):
        draw(tiny_model, [Request("", label="cat")])


def test_the_library_takes_labels(tiny_model: LatentDiffusion) -> None:
    model = told_more(tiny_model, EncoderConfig(labels=("cat", "dog", "hen")), classes=3, context_width=0)
    both = model.txt2img(label=["cat", "hen"], steps=2, cfg=2.0, batch_size=1)
    assert torch.equal(both[1:], draw(model, [Request("", seed=1, label="hen")], steps=2, cfg=2.0))
    *_, last = model.sample(label="cat", steps=2, cfg=2.0)
    torch.testing.assert_close(model.decode(last), both[:1], rtol=0, atol=1e-4)
    image = torch.zeros(1, 3, 32, 32)
    changed = model.img2img(image, label=["cat", "dog"], seed=[3, 3], steps=2)
    assert changed.shape == (2, 3, 32, 32) and not torch.equal(changed[0], changed[1])
    with pytest.warns(PromptNotice, match="takes no text, so nothing comes of 'a cat'"):
        model.txt2img("a cat", label="cat", steps=1)
    with pytest.warns(
        PromptNotice, match="no label was given, so any class may be drawn; this model knows cat, dog, h"
    ):
        model.txt2img(steps=1)
    with pytest.raises(UserError, match="there is no label 'cow'"):
        model.txt2img(label=["cat", "cow"], batch_size=1, steps=1)
    numbers = told_more(tiny_model, classes=3)  # with captions too
    assert not torch.equal(numbers.txt2img("a cat", label=2, steps=1), numbers.txt2img("a cat", steps=1))
    with pytest.raises(UserError, match="there is no label '3'; this model knows 0 to 2"):
        numbers.txt2img("a cat", label=3, steps=1)


def test_a_network_is_told_the_pictures_size(tiny_model: LatentDiffusion) -> None:
    model = told_more(tiny_model, EncoderConfig(pooled=True, sizes=8), vector_width=16 + 6 * 8)
    square, wide = draw(model, [Request("a cat")]), draw(model, [Request("a cat")], width=64)
    assert square.shape[-1] == 32 and wide.shape[-1] == 64
    one, other = (model.encoder([Ask("a cat", size=(32, 32), target=target)]) for target in ((32, 32), (32, 64)))
    assert one.vector is not None and other.vector is not None and one.vector.shape == (1, 64)
    assert torch.equal(one.vector[:, :-8], other.vector[:, :-8]) and not torch.equal(one.vector, other.vector)
    with pytest.raises(UserError, match="the vector that is made here is 0 wide and the U-Net takes 3"):
        told_more(tiny_model, vector_width=3)


def test_an_inpainting_network_is_given_mask_and_picture(tiny_model: LatentDiffusion) -> None:
    model = told_more(tiny_model, in_channels=9)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    drawn = model.img2img(image, "a cat", mask=mask, strength=1.0, steps=2)
    assert torch.equal(drawn[..., 16:], image[..., 16:]) and not torch.equal(drawn[..., :16], image[..., :16])
    under = image * (1 - mask) + 0.7 * mask  # what lies under it shows through the first noise alone
    again = model.img2img(under, "a cat", mask=mask, strength=1.0, steps=2)
    assert float((again - drawn).abs().mean()) < 0.02 < float((under - image).abs().mean())
    whole = model.txt2img("a cat", steps=2)  # without a picture all is drawn
    assert bool(whole.isfinite().all()) and not torch.equal(whole[..., :16], drawn[..., :16])


def test_a_depth_network_is_given_the_depth(tiny_model: LatentDiffusion) -> None:
    model = told_more(tiny_model, in_channels=5)
    image, depth = torch.zeros(1, 3, 32, 32), torch.arange(32.0).expand(1, 1, 32, 32)
    one, other = (model.img2img(image, "a cat", depth=d, strength=1.0, steps=2) for d in (depth, depth.flip(3)))
    assert not torch.equal(one, other)
    assert torch.equal(model.img2img(image, "a cat", depth=7 * depth + 3, strength=1.0, steps=2), one)
    with pytest.raises(UserError, match="1 channels beside the latent, a depth map, which img2img takes as depth="):
        model.txt2img("a cat", steps=2)
    with pytest.raises(UserError, match="takes 3 channels beside the latent, and what they mean is unknown"):
        told_more(tiny_model, in_channels=7).txt2img("a cat", steps=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("TINY", "cpu", "fp32", "xformers"), "'xformers' is not available here"),
        (("no such model",), "neither one that ships"),
        (("TINY", "gpu"), "no device 'gpu'"),
        (("TINY", "cpu", "fp8"), "no precision 'fp8'"),
    ],
)
def test_what_cannot_be_loaded(tiny_checkpoint: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        path, attention = tiny_checkpoint if arguments[0] == "TINY" else arguments[0], arguments[3:] or ("sdpa",)
        load(path, *arguments[1:3], attention=attention[0])


# ---------------------------------------------------------------- pictures that say how they were made


def test_a_recipe_comes_back_from_a_png(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    settings = Settings(steps=3, sampler="ddpm", options={"variance": "beta"}, cfg_interval=(0.1, torch.inf), tile=16)
    batch = [Request("a ${cat}", "ü", 3), Request("a red heart", "", 4)]
    images = generate.draw(tiny_model, batch, settings.plan())
    save_png(images[1], tmp_path / "a.png", provenance.record(tiny_model, settings, batch, 1))
    save_png(images[0], tmp_path / "b.png", provenance.record(tiny_model, settings, batch, 0))
    recipe = provenance.read(tmp_path / "a.png")
    assert recipe.request == batch[1] and provenance.read(tmp_path / "b.png").request == batch[0]
    whole = settings.of(tiny_model.config.drawing).check()
    assert recipe.settings == dataclasses.replace(whole, width=32, height=32, spacing="karras")
    assert provenance.differences(recipe, tiny_model) == []
    again = generate.draw(tiny_model, recipe.batch, recipe.settings.plan(), batch_size=recipe.batch_size)[recipe.index]
    assert torch.equal(again, images[1])

    other = dataclasses.replace(tiny_model, config=dataclasses.replace(tiny_model.config, parameterization="eps"))
    assert "the model differs" in provenance.differences(recipe, other)[0]
    elsewhere = dataclasses.replace(recipe, made_on={**recipe.made_on, "threads": 99})
    assert "threads was 99" in provenance.differences(elsewhere, tiny_model)[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "0 steps"),
        ({"steps": "many"}, "'many'"),
        ({"seed": "7"}, "lacks a setting"),
        ({"seed": -7}, "out of range"),
        ({"batch": {"size": 10**9, "index": 1}}, "cannot be"),
        ({"batch": {"size": 2, "index": 2}}, "cannot be"),
        ({"model": None}, "lacks a setting"),
        ({"made_on": {"device": ["cpu"]}}, "lacks a setting"),
        ({"cfg": 10**400}, "cfg must be a number"),
        ({"variation": [1, 10**400]}, "more than 300 digits"),
        ({"adapters": [{"kind": "lora", "path": "a", "scale": 10**400, "hash": ""}]}, "more than 300 digits"),
    ],
)
def test_recipes_that_make_no_sense(
    tiny_model: LatentDiffusion, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    record = provenance.record(tiny_model, FAST, [Request("a cat")], 0) | changes
    save_png(torch.zeros(3, 32, 32), tmp_path / "a.png", record)
    with pytest.raises(UserError, match=words):
        provenance.read(tmp_path / "a.png")


def test_a_recipe_whose_prompt_is_no_text(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    """Half of a letter, as JSON may spell it; PNG's own texts could not hold it."""
    record = provenance.record(tiny_model, FAST, [Request("a cat")], 0) | {"prompt": "a \ud800"}
    texts = PngInfo()
    texts.add_text("ldm", json.dumps(record))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png", pnginfo=texts)
    with pytest.raises(UserError, match="not Unicode text"):
        provenance.read(tmp_path / "a.png")


def test_a_grid_is_not_a_recipe(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    sheet = provenance.record_sheet(tiny_model, FAST, jobs.of_prompts(["a cat"], n=2))
    save_png(torch.zeros(3, 32, 32), tmp_path / "grid.png", sheet)
    with pytest.raises(UserError, match="is it a grid"):
        provenance.read(tmp_path / "grid.png")


def test_the_hash_is_of_weights_and_config(tiny_model: LatentDiffusion, tiny_checkpoint: Path) -> None:
    assert load(tiny_checkpoint, "cpu", "bf16").hash == tiny_model.hash  # of what is stored
    in_memory = dataclasses.replace(tiny_model, path=None)
    assert in_memory.hash != dataclasses.replace(broken(tiny_model, "unet"), path=None).hash


def test_img2img_is_nearer_to_the_picture_the_less_it_is_noised(tiny_model: LatentDiffusion) -> None:
    shipped = load(device="cpu")
    heart = shipped.txt2img("a red heart, flat emoji", cfg=3, steps=10)

    def change(strength: float) -> float:
        drawn = shipped.img2img(heart, "a dog face, noto emoji", cfg=3, strength=strength, steps=10, seed=5)
        return float((drawn - heart).square().mean())

    assert change(0.2) < change(0.6) < change(1.0)
    image = tiny_model.txt2img(["a cat", "a red heart"], seed=3, steps=2)
    alone = tiny_model.img2img(image[1:], "a dog", strength=0.5, steps=4, seed=6)
    both = tiny_model.img2img(image, "a dog", strength=0.5, steps=4, seed=5, batch_size=1)
    assert torch.equal(both[1:], alone), "picture i has seed + i"
    for words, call in (
        ("the strength is 1.5", lambda: tiny_model.img2img(image, "a", strength=1.5)),
        ("2 pictures to begin from", lambda: tiny_model.img2img(image, ["a"], batch_size=1)),
        ("the mask is", lambda: tiny_model.img2img(image, "a", mask=torch.ones(1, 1, 32, 16))),
    ):
        with pytest.raises(UserError, match=words):
            call()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "heun"])
def test_inpainting_leaves_the_rest_alone(tiny_model: LatentDiffusion, sampler: str) -> None:
    """Outside the mask the pixels are the picture's own, bit for bit; the latents end there as the known ones."""
    image = tiny_model.txt2img("a cat", seed=3, steps=2)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    drawn = tiny_model.img2img(image, "a dog", mask=mask, strength=1.0, steps=4, seed=5, sampler=sampler)
    outside = (mask == 0).expand_as(image)
    assert torch.equal(drawn[outside], image[outside]) and not torch.allclose(drawn[~outside], image[~outside])

    request, settings = [Request("a dog", seed=5)], Settings(steps=4, sampler=sampler)
    *_, last = generate.sample(tiny_model, request, settings.plan(), start=Picture(image, 1.0, mask))
    known = tiny_model.codec.encode(image)
    inside = torch.nn.functional.max_pool2d(mask, tiny_model.codec.factor).bool().expand_as(known)
    torch.testing.assert_close(last.x[~inside].float(), known[~inside], rtol=0, atol=1e-6)


def test_what_a_mask_touches_of_a_latents_pixel_is_drawn(tiny_model: LatentDiffusion) -> None:
    """A line of one pixel draws the same latents as all of the cells that it crosses."""
    image, factor = torch.rand(1, 3, 32, 32) * 2 - 1, tiny_model.codec.factor
    line, cells = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
    line[..., factor + 1, :] = 1
    cells[..., factor : 2 * factor, :] = 1
    ends = []
    for mask in (line, cells):
        *_, last = tiny_model.sample_img2img(image, "a dog", mask=mask, strength=1.0, steps=2)
        ends.append(last.x)
    assert torch.equal(*ends)


def test_a_learned_variance_is_what_ddpm_steps_with(tmp_path: Path) -> None:
    """The network's second half says beta (v = 1) or beta-tilde (v = -1) everywhere; under guidance too."""
    assert TINY.unet
    unet = dataclasses.replace(TINY.unet, out_channels=2 * TINY.unet.out_channels)
    config = dataclasses.replace(TINY, unet=unet, learned_variance=True)
    native.save(tmp_path / "learned", config, tiny_parts(config))  # type: ignore[arg-type]
    model = load(tmp_path / "learned", device="cpu")
    half = model.unet.config.in_channels

    def drawn(variance: str, v: float | None = None) -> Tensor:
        if v is not None:
            last = model.unet.conv_out
            with torch.no_grad():
                last.weight[half:] = 0
                last.bias[half:] = v
        return model.txt2img(
            "a cat", cfg=2.0, settings=Settings(steps=4, sampler="ddpm", options={"variance": variance})
        )

    torch.testing.assert_close(drawn("learned", 1.0), drawn("beta"))
    torch.testing.assert_close(drawn("learned", -1.0), drawn("posterior"))
    assert not torch.allclose(drawn("learned", 0.0), drawn("posterior"))
