"""`scripts/evaluate.py likelihood`, run as a user runs it on a random model, and what its figures depend on."""

from __future__ import annotations

import io
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.api import LatentDiffusion, assemble
from ldm.autoencoder.codec import Codec
from ldm.config import AutoencoderConfig, DataConfig, UNetConfig
from ldm.data.loader import Batch, validation_batches
from ldm.data.writing import write_shard
from ldm.errors import UserError
from ldm.metrics import likelihood
from ldm.metrics.likelihood import Method, evaluate_likelihood
from ldm.unet import UNet

ROOT = Path(__file__).parents[2]
HELD_OUT = str(ROOT / "tests" / "fixtures" / "icons" / "val-0000.tar")


def pictures(count: int, size: int) -> Batch:
    return next(validation_batches(DataConfig(validation=HELD_OUT, size=size), count))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the verb with words; returns (exit code, what it printed, what it complained of)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "likelihood", "--shards", HELD_OUT, *map(str, words)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_both_methods_as_a_user_runs_them(command, tiny_checkpoint, tiny_model, tmp_path):
    report = tmp_path / "report.json"
    words = ("--model", tiny_checkpoint, "--count", 2, "--batch-size", 1, "--seed", 5, "--output", report)
    code, out, _ = command(*words, "--tolerance", 0.2)
    made = json.loads(report.read_text())
    assert code == 0
    assert "2 pictures of 32 px" in out and "bits/dim[latent]" in out
    assert made["figures"]["space"] == "latent" and made["protocol"]["seeds"] == [5, 6]
    assert made["sources"] == {"pictures": HELD_OUT} and made["subject"]["weights"] == "the only ones"
    known = made["protocol"]["pictures"]
    assert (known["pictures"], len(known["hash"])) == (2, 64) and f"hash {known['hash'][:8]}" in out
    batch = pictures(2, 32)
    flow = likelihood.flow(tiny_model, batch.image, batch.caption, [5, 6], tolerance=0.2)
    assert made["each"] == pytest.approx(flow.bits.value.tolist(), rel=1e-4)  # encoded in batches of another size

    code, out, _ = command(*words, "--method", "bound", "--strata", 4, "--variance", "beta")
    document = json.loads(report.read_text())
    assert document["protocol"]["pictures"] == known  # the same pictures, in batches of whatever size
    made = document["figures"]
    assert code == 0 and "bound: " in out
    assert made["prior"] + made["steps"] + made["decoder"] == pytest.approx(made["bits_per_dim"], abs=1e-4)
    chain = likelihood.chain(tiny_model, batch.image, batch.caption, [5, 6], "beta", 4, 2)
    assert made["bits_per_dim"] == pytest.approx(chain.total.mean, rel=1e-4)

    for mistake, complaint in (
        (("--count", 0), "--count is 0"),
        (("--seed", -5), "--seed is -5; it must be between 0 and"),
        (("--method", "bound", "--strata", -3), "--strata is -3; it must be at least 0"),
        (("--method", "bound", "--variance", "learned"), "has no learned variance"),
        (("--method", "bound", "--strata", 500), "500 strata"),
    ):
        code, _, err = command(*words, *mistake)
        assert code == 1 and complaint in err and err.count("\n") == 1


def test_the_protocol_knows_pictures_and_captions(tiny_model, tmp_path):
    """A picture that is another by one level, and a caption by one letter, are other pictures."""

    def known(level: int, caption: str) -> str:
        content = io.BytesIO()
        Image.new("RGB", (32, 32), (level, 0, 0)).save(content, "PNG")
        write_shard(tmp_path / "one.tar", [("0", {"png": content.getvalue(), "txt": caption.encode()})])
        method = Method("bound", variance="beta", strata=1, draws=1)
        made = evaluate_likelihood(tiny_model, str(tmp_path / "one.tar"), {}, method, count=1)
        return made["protocol"]["pictures"]["hash"]

    assert known(100, "a cat") == known(100, "a cat")
    assert len({known(100, "a cat"), known(101, "a cat"), known(100, "a bat")}) == 3


def test_the_caption_counts(tiny_model):
    batch = pictures(1, 32)
    figures = [
        likelihood.chain(tiny_model, batch.image, [caption], [0], "beta", 2, 1).total.mean
        for caption in (batch.caption[0], batch.caption[0], "a pizza")
    ]
    assert figures[0] == figures[1] != figures[2]


@pytest.fixture
def pixel_model(tiny_model) -> LatentDiffusion:
    """Random, of 8-bit pixels, with the codec's shift and scale not trivial, and a learned variance."""
    kind = AutoencoderConfig(kind="identity", latent_channels=3, shift=(0.1,), scale=(2.0,))
    unet = UNetConfig(
        in_channels=3, out_channels=6, channels=32, multipliers=(1,), blocks=1, attention_levels=(), context_width=32
    )
    config = replace(tiny_model.config, autoencoder=kind, unet=unet, image_size=8, learned_variance=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return assemble(config, Codec(None, kind), tiny_model.towers, UNet(unet).eval())


def test_a_pixel_model_is_measured_in_pixels(pixel_model):
    """Its network begins at 0, which for v is the optimal denoiser of unit normals: the flow's density is known.

    By the flow each pixel is dequantised in its own 2 / 255, and N(0, 1) of x = 2 (pixel - 0.1) takes so many bits.
    """
    batch = pictures(2, 8)
    # Inner levels alone: the outermost are open to infinity, so the decoder finds them likelier than a density.
    image = ((0.7 * batch.image + 1) * 127.5).round() / 127.5 - 1
    flow = likelihood.flow(pixel_model, image, batch.caption, [1, 2])
    assert str(flow.bits).endswith("bits/dim[pixels]")
    x = (2 * (image.double() - 0.1)).flatten(1)
    nats = 0.5 * (x.square().mean(1) + torch.tensor(2 * torch.pi).log())
    wanted = nats / torch.tensor(2.0).log() + torch.tensor(127.5).log2() - 1
    torch.testing.assert_close(flow.bits.value, wanted, rtol=0, atol=0.02)  # what dequantising moves
    other = likelihood.flow(pixel_model, image, batch.caption, [3, 4])
    assert bool((flow.bits.value != other.bits.value).all()), "each seed dequantises by its own draw"

    chain = likelihood.chain(pixel_model, image, batch.caption, [1, 2], "learned", 20, 3)
    assert chain.space == "pixels" and chain.steps.shape == (2, 20)
    assert bool((chain.total.value > flow.bits.value - 4 * chain.error).all())
    assert bool((chain.total.value < flow.bits.value + 1 + 4 * chain.error).all())
    with pytest.raises(UserError, match="choose posterior or beta"):
        likelihood.chain(pixel_model, image, batch.caption, [1, 2], "betta", strata=2)
