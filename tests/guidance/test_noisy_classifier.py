"""The classifier of noisy latents: what it learns, what its command writes, and whose latents it reads."""

from __future__ import annotations

from ldm.script import run

import copy
import dataclasses
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.autoencoder.codec import Codec
from ldm.config import AutoencoderConfig
from ldm.errors import UserError
from ldm.guidance import classifier_guidance
from ldm.guidance.latents import latent_probe, same_latents
from ldm.guidance.noisy_classifier import (
    NoisyClassifier,
    NoisyClassifierConfig,
    load_noisy_classifier,
    save_noisy_classifier,
)

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "train_noisy_classifier.py")
SHARDS = str(ROOT / "tests" / "fixtures" / "icons" / "train-*.tar")


@pytest.fixture
def command(monkeypatch, tiny_checkpoint, capsys) -> Callable[..., tuple[int, str, str]]:
    """The tool, on the fixture's two drawers: (exit code, what it printed, what it complained of)."""

    def call(*words: object) -> tuple[int, str, str]:
        given = ["--model", tiny_checkpoint, "--shards", SHARDS, "--label", "source", "--views", 2, "--batch", 8]
        given += ["--channels", 8, "--steps", 4, "--device", "cpu", *words]
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, given)])
        code = 0
        try:
            run(runpy.run_path(TOOL)["main"])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def new_classifier(classes: int = 3, channels: int = 8) -> NoisyClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = tuple(f"class {i}" for i in range(classes))
        classifier = NoisyClassifier(NoisyClassifierConfig(names, 4, (1.0, 2.0), channels, dropout=0.0))
        for parameter in classifier.parameters():
            if not bool(parameter.detach().any()):
                torch.nn.init.normal_(parameter, std=0.1)
    return classifier.eval().requires_grad_(False)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---------------------------------------------------------------- the network


def test_logits_of_each_picture_are_its_own() -> None:
    classifier, x = new_classifier(), 3 * noise(3, 4, 8, 8)
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    together = classifier(x, sigma)
    assert together.shape == (3, 3) and together.dtype == torch.float32
    alone = torch.cat([classifier(x[i : i + 1], sigma[i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(classifier(x, sigma), classifier(x, sigma.flip(0)), atol=1e-3)
    assert classifier(x[:, :, :1, :3], sigma).shape == (3, 3)  # of any size


def test_levels_beyond_the_trained_ones_are_read_as_the_nearest() -> None:
    """At the same network input, so only the level that it is told differs."""
    classifier, z = new_classifier(), noise(2, 4, 8, 8)

    def told(sigma: float) -> Tensor:
        level = torch.tensor(sigma, dtype=torch.float64)
        return classifier(z * (1 + level**2).sqrt(), level)

    torch.testing.assert_close(told(1e5), told(20.0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told(1e-5), told(0.02), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(told(1.0), told(20.0), atol=1e-3)


def test_guidance_raises_the_probability_of_each_pictures_class() -> None:
    classifier, x, sigma = new_classifier(), noise(3, 4, 8, 8), torch.tensor(1.0, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    log_probability = classifier.of(labels)
    expected = classifier(x, sigma).log_softmax(dim=1)[torch.arange(3), labels]
    torch.testing.assert_close(log_probability(x, sigma), expected)
    with torch.no_grad():
        guided = classifier_guidance(lambda x, sigma: x, log_probability, 0.1)(x, sigma)
        assert bool((log_probability(guided, sigma) > expected + 1e-5).all())
    assert guided.dtype == torch.float64


def test_it_learns_the_posterior_at_every_level() -> None:
    """Two classes of 1 x 1 latents, at -1 and 1 in each channel: log odds are 2 sum(x) / (0.25 + sigma^2).

    The probabilities are right to 0.08 on average at levels from 0.3 to 5 (measured: 0.01 to 0.06). The exact ones of
    sigma 1, taken at all levels, would be wrong by 0.2 at 3 and 0.3 at 5.
    """
    names = runpy.run_path(TOOL)
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(2, (20000,), generator=generator)
    clean = (2.0 * label - 1)[:, None, None, None] + 0.5 * torch.randn(20000, 4, 1, 1, generator=generator)
    levels = {"sigma_min": 0.2, "sigma_max": 5.0}
    config = NoisyClassifierConfig(("left", "right"), channels=16, multipliers=(1,), dropout=0.0, **levels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = NoisyClassifier(config)
    names["train"](classifier, names["Latents"](clean[None], label, ("left", "right")), 300, 128, 3e-3, 0)
    classifier.requires_grad_(False)
    for sigma in (0.3, 1.0, 3.0, 5.0):
        x = clean[:1000] + sigma * torch.randn(1000, 4, 1, 1, generator=generator)
        found = classifier(x, torch.tensor(sigma)).softmax(dim=1)[:, 1]
        exact = torch.sigmoid(2 * x.flatten(1).sum(dim=1) / (0.25 + sigma**2))
        assert float((found - exact).abs().mean()) < 0.08, sigma


# ---------------------------------------------------------------- the command


def test_the_command_trains_on_the_fixture(command, tmp_path: Path, tiny_model) -> None:
    code, out, err = command("--output", tmp_path / "c")
    assert (code, err) == (0, "") and "44 pictures of 2 classes to learn, 4 held out" in out and "sigma 0.1" in out
    classifier = load_noisy_classifier(tmp_path / "c")
    assert classifier.config.classes == ("fluent-flat", "noto") and classifier.config.latent_channels == 4
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    assert same_latents(classifier.config.probe, latent_probe(tiny_model.codec))
    assert classifier.places(["noto", "fluent-flat", "noto"]).tolist() == [1, 0, 1]
    with pytest.raises(UserError, match="no class 'nodo'; it knows noto"):
        classifier.places(["nodo"])

    command("--output", tmp_path / "again")
    state, again = (load_noisy_classifier(tmp_path / name).state_dict() for name in ("c", "again"))
    assert all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--label", "species"), "name another --label"),
        (("--pictures", "1000"), "lower --pictures"),
        (("--size", "30"), "multiples of 4"),
        (("--channels", "7"), "even number"),
        (("--steps", "0"), "at least 1"),
        (("--sigma-min", "3", "--sigma-max", "2"), "--sigma-min must be above 0 and below --sigma-max"),
        (("--model", "nothing"), "no model 'nothing'"),
    ],
)
def test_what_the_command_refuses(command, tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    code, _, err = command("--output", tmp_path / "c", *words)
    assert code == 1 and sentence in err and err.count("\n") == 1 and not (tmp_path / "c").exists()


# ---------------------------------------------------------------- on disk


def test_it_comes_back_from_disk(tmp_path: Path) -> None:
    classifier, x = new_classifier(), noise(2, 4, 8, 8)
    save_noisy_classifier(classifier, tmp_path)
    again = load_noisy_classifier(tmp_path)
    assert again.config == classifier.config
    assert torch.equal(again(x, torch.tensor(1.0)), classifier(x, torch.tensor(1.0)))


def test_a_missing_and_a_torn_classifier_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_noisy_classifier\.py"):
        load_noisy_classifier(tmp_path / "nothing")
    save_noisy_classifier(new_classifier(), tmp_path)
    weights = tmp_path / "noisy_classifier.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_noisy_classifier(tmp_path)
    weights.write_bytes(whole)
    document = (tmp_path / "noisy_classifier.json").read_text()
    for wrong, words in (("{", "valid JSON"), ('{"classes": ["a"], "layers": 3}', "unknown setting 'layers'")):
        (tmp_path / "noisy_classifier.json").write_text(wrong)
        with pytest.raises(UserError, match=words):
            load_noisy_classifier(tmp_path)
    for channels in (12, 10**9):
        wrong = document.replace('"channels": 8', f'"channels": {channels}')
        (tmp_path / "noisy_classifier.json").write_text(wrong)
        with pytest.raises(UserError, match="cannot be read"):
            load_noisy_classifier(tmp_path)


# ---------------------------------------------------------------- whose latents


def test_latents_are_known_by_their_codec(tiny_model) -> None:
    """Rounded weights are the same latents; another autoencoder or another scale is not."""
    codec = tiny_model.codec
    probe = latent_probe(codec)
    assert codec.autoencoder is not None and len(probe) == 4 * 4 * 4
    half = Codec(copy.deepcopy(codec.autoencoder).half().float(), codec.config)
    assert latent_probe(half) != probe and same_latents(probe, latent_probe(half))

    other = copy.deepcopy(codec.autoencoder)
    for parameter in other.parameters():
        if parameter.ndim > 1:
            parameter.mul_(0.8)
    rescaled = dataclasses.replace(codec.config, scale=(0.7,))
    pixels = AutoencoderConfig(kind="identity", scale=(1.0,))
    for stranger in (Codec(other, codec.config), Codec(codec.autoencoder, rescaled), Codec(None, pixels)):
        assert not same_latents(probe, latent_probe(stranger))
    assert same_latents((), ()) and not same_latents((), probe)
