"""Less memory, the same pictures to rounding; after an out-of-memory error too, and it is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ldm
from ldm import generate
from ldm import told as told_of
from ldm.api import LatentDiffusion
from ldm.backends import sparing
from ldm.backends.sparing import InPieces, visiting
from ldm.conditioning.condition import Condition
from ldm.errors import MemoryNotice, UserError
from ldm.jobs import Request, Settings

FAST = Settings(steps=3, cfg=3.0, prompt_syntax="weighted")
REQUESTS = [Request("a cat", "blue", 3), Request("a dog " * 10, "", 4), Request("red AND blue", "", 5)]


@pytest.fixture
def sparing_model(tiny_checkpoint: Any) -> LatentDiffusion:
    return ldm.load(tiny_checkpoint, device="cpu", low_memory=True)


def draw(model: LatentDiffusion, **changes: Any) -> Tensor:
    return generate.draw(model, REQUESTS, replace(FAST, **changes).plan())


def failing(work: Callable[..., Any], times: int, above: int = 0) -> Callable[..., Any]:
    """`work`, which the memory does not suffice for the first `times`, or for batches of more than `above` ever."""
    left = [times]

    def tried(x: Tensor, *others: Any) -> Any:
        if left[0] > 0 or (above and len(x) > above):
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return work(x, *others)

    return tried


def told(work: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = work()
    return result, [str(each.message) for each in found if each.category is MemoryNotice]


# ---------------------------------------------------------------- asked for


def test_a_model_that_saves_memory_draws_the_same(
    tiny_model: LatentDiffusion, sparing_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, evaluated, decoded = draw(tiny_model), [], []
    unet, autoencoder = sparing_model.unet, sparing_model.codec.autoencoder
    assert autoencoder is not None
    forward, decode = unet.forward, autoencoder.decode
    monkeypatch.setattr(unet, "forward", lambda x, *others: evaluated.append(len(x)) or forward(x, *others))
    monkeypatch.setattr(autoencoder, "decode", lambda z: decoded.append(len(z)) or decode(z))
    torch.testing.assert_close(draw(sparing_model), usual, atol=1e-4, rtol=0)
    assert evaluated == [1] * 3 * 3 * 3 and decoded == [1] * 3  # steps, pictures, branches: the most have three
    assert sparing_model.device.type == "cpu" and sparing_model.works_on is not None


def test_networks_are_on_the_device_while_they_work(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no second device here: what is moved where is written down instead."""
    moves: list[str] = []
    parts = {"encoder": tiny_model.encoder, "unet": tiny_model.unet, "codec": tiny_model.codec.autoencoder}
    for name, part in parts.items():
        assert part is not None
        monkeypatch.setattr(part, "to", lambda where, name=name: moves.append(f"{name} {where}"))
    model = replace(tiny_model, works_on=torch.device("cuda:1"))
    assert model.device == torch.device("cuda:1")
    with visiting(model, model.encoder), visiting(model, model.unet, None):
        moves.append("work")
    assert moves == ["encoder cuda:1", "unet cuda:1", "work", "unet cpu", "encoder cpu"]
    moves.clear()
    with pytest.raises(KeyError), visiting(model, model.unet):
        raise KeyError
    assert moves == ["unet cuda:1", "unet cpu"]
    moves.clear()
    for still in (tiny_model, replace(tiny_model, works_on=torch.device("cpu"))):
        with visiting(still, still.unet):
            assert not moves


def test_each_network_visits_once_in_the_order_of_the_path(
    sparing_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    names = {id(sparing_model.encoder): "encoder", id(sparing_model.unet): "unet"}
    real = sparing.visiting

    def spied(model: Any, *networks: Any) -> Any:
        order.append(names.get(id(networks[0]), "codec"))
        return real(model, *networks)

    for room in (generate, told_of):
        monkeypatch.setattr(room, "visiting", spied)
    sparing_model.img2img(torch.zeros(1, 3, 32, 32), "a cat", settings=FAST)
    assert order == ["codec", "encoder", "encoder", "codec", "unet", "codec"]


# ---------------------------------------------------------------- after an error


@pytest.mark.parametrize("syntax", ["plain", "weighted"])
def test_a_network_that_runs_out_of_memory_once_is_run_in_halves(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, syntax: str
) -> None:
    usual = draw(tiny_model, prompt_syntax=syntax)
    monkeypatch.setattr(tiny_model.unet, "forward", failing(tiny_model.unet.forward, 1))
    found, notices = told(lambda: draw(tiny_model, prompt_syntax=syntax))
    torch.testing.assert_close(found, usual, atol=1e-4, rtol=0)
    rows = 9 if syntax == "weighted" else 6
    assert notices == [
        f"the device's memory did not suffice, so the network is run on {(rows + 1) // 2} at once, where it was {rows}"
    ]


def test_down_to_one_at_a_time_and_then_a_sentence(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, forward = draw(tiny_model), tiny_model.unet.forward
    monkeypatch.setattr(tiny_model.unet, "forward", failing(forward, 0, above=1))
    found, notices = told(lambda: draw(tiny_model))
    torch.testing.assert_close(found, usual, atol=1e-4, rtol=0)
    assert [notice.split("run on ")[1][0] for notice in notices] == ["5", "3", "2", "1"]
    monkeypatch.setattr(tiny_model.unet, "forward", failing(forward, 1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="memory does not suffice for 3 pictures of this size at once; use a smal"):
            draw(tiny_model)


def test_other_errors_are_not_tried_again() -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("shapes do not fit")

    network = InPieces(broken)  # type: ignore[arg-type]
    told = Condition(label=torch.zeros(4, dtype=torch.long))
    with pytest.raises(RuntimeError, match="shapes"):
        network(torch.zeros(4, 1), torch.zeros(4), lambda a, b: told[a:b])


def test_a_decoder_that_runs_out_of_memory(tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """First a picture at a time, then in tiles, then a sentence."""
    codec = tiny_model.codec
    assert codec.autoencoder is not None
    latent, decode = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), codec.autoencoder.decode
    with torch.no_grad():
        usual = codec.decode(latent)
        monkeypatch.setattr(codec.autoencoder, "decode", failing(decode, 0, above=1))
        found, notices = told(lambda: sparing.decode(codec, latent, None, None, 16))
        torch.testing.assert_close(found, usual, atol=1e-5, rtol=0)
        assert notices == ["the device's memory did not suffice, so pictures are decoded one by one"]
        monkeypatch.setattr(codec.autoencoder, "decode", failing(decode, 2))
        found, notices = told(lambda: sparing.decode(codec, latent, None, None, 16))
        tiled = torch.cat([codec.decode_tiled(part, 16, codec.overlap(16)) for part in latent.split(1)])
        torch.testing.assert_close(found, tiled, atol=1e-5, rtol=0)
        assert len(notices) == 2 and "tiles of 16 pixels" in notices[1]
        monkeypatch.setattr(codec.autoencoder, "decode", failing(decode, 100))
        with pytest.raises(torch.OutOfMemoryError):
            told(lambda: sparing.decode(codec, latent, None, None, 16))
