"""What settings name beside the model: loaded, checked, told in the picture, and obeyed on the path of sampling."""

from __future__ import annotations

from ldm.script import run

import copy
import dataclasses
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import generate, image_io, provenance
from ldm.api import LatentDiffusion
from ldm.checkpoints.record import Checkpoint
from ldm.errors import UserError
from ldm.guidance.latents import latent_probe
from ldm.guidance.noisy_classifier import NoisyClassifier, NoisyClassifierConfig, save_noisy_classifier
from ldm.helpers import open_helpers
from ldm.jobs import Request, Settings

FAST = Settings(steps=4, cfg=3.0, sampler="ddim", spacing="trailing")
REQUESTS = [Request("a cat", "", 3), Request("a red heart", "", 4)]
NEGATIVE = [dataclasses.replace(request, negative="blue") for request in REQUESTS]
SCRIPT = str(Path(__file__).parents[1] / "scripts" / "txt2img.py")


def draw(model: LatentDiffusion, requests: list[Request] = REQUESTS, **changes: Any) -> Tensor:
    plan = dataclasses.replace(FAST, **changes).plan()
    return generate.draw(model, requests, plan, open_helpers(model, plan))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def classifier(tiny_model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random classifier of the tiny model's latents, with classes cat and dog."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = NoisyClassifierConfig(("cat", "dog"), 4, latent_probe(tiny_model.codec), 8, sigma_min=0.5)
        made = NoisyClassifier(config)
        torch.nn.init.normal_(made.linear_out.weight)
    folder = tmp_path_factory.mktemp("classifier")
    save_noisy_classifier(made, folder)
    return str(folder)


@pytest.fixture(scope="module")
def worse(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with other weights in its U-Net."""
    path = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("models") / "worse"))
    generator = torch.Generator().manual_seed(1)
    state = load_file(path / "unet.safetensors")
    moved = {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    save_file(moved, path / "unet.safetensors")
    return str(path)


# ---------------------------------------------------------------- each does what it is to do


def test_a_perpendicular_negative(tiny_model: LatentDiffusion) -> None:
    plain = draw(tiny_model)
    assert torch.equal(draw(tiny_model, NEGATIVE, perp_negative=0.0), plain)  # the negative has no weight
    across = draw(tiny_model, NEGATIVE, perp_negative=1.0)
    assert apart(across, plain) > 1e-3 and apart(across, draw(tiny_model, NEGATIVE)) > 1e-3
    own = [dataclasses.replace(request, negative=request.prompt) for request in REQUESTS]
    assert apart(draw(tiny_model, own, perp_negative=1.0), plain) < 1e-3  # nothing of it is across the prompt


def test_a_guide_model(tiny_model: LatentDiffusion, tiny_checkpoint: Path, worse: str) -> None:
    assert apart(draw(tiny_model, guide_model=str(tiny_checkpoint)), draw(tiny_model, cfg=1.0)) < 1e-3
    guided = draw(tiny_model, guide_model=worse)
    assert apart(guided, draw(tiny_model)) > 1e-3
    assert torch.equal(draw(tiny_model, guide_model=worse, cfg=1.0), draw(tiny_model, cfg=1.0))


def test_a_classifier(tiny_model: LatentDiffusion, classifier: str) -> None:
    """It makes its class likelier, in pictures drawn under no_grad; at scale 0 it does nothing."""
    to_dog = {"classifier": classifier, "classifier_class": "dog"}
    assert torch.equal(draw(tiny_model, **to_dog, classifier_scale=0.0), draw(tiny_model))
    helpers = open_helpers(tiny_model, Settings(**to_dog).plan())

    def share_of_dogs(scale: float) -> Tensor:
        settings = dataclasses.replace(FAST, **to_dog, classifier_scale=scale)
        *_, last = generate.sample(tiny_model, REQUESTS, settings.plan(), helpers)
        return helpers.classifiers[classifier](last.x, torch.tensor(0.5)).softmax(dim=1)[:, 1]

    assert bool((share_of_dogs(20.0) > share_of_dogs(0.0)).all())


def test_a_classifier_is_asked_only_at_levels_it_was_trained_on(tiny_model: LatentDiffusion, classifier: str) -> None:
    """It was trained down to 0.5, and the grid goes further."""
    settings = dataclasses.replace(FAST, steps=8, classifier=classifier, classifier_class="dog")
    helpers, asked = open_helpers(tiny_model, settings.plan()), []
    helpers.classifiers[classifier].register_forward_pre_hook(
        lambda module, inputs: asked.append(float(inputs[1].max()))
    )
    walked = [step.sigma for step in generate.sample(tiny_model, REQUESTS, settings.plan(), helpers)]
    assert min(walked) < 0.5 < max(walked)
    assert asked == [sigma for sigma in walked if sigma > 0.5]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_threshold_has_the_last_word(tiny_model: LatentDiffusion, classifier: str, kind: str) -> None:
    """After the classifier, whose steps leave the range."""
    to_dog = {"classifier": classifier, "classifier_class": "dog", "classifier_scale": 1000.0}
    helpers = open_helpers(tiny_model, Settings(**to_dog).plan())
    free, bound = (
        max(float(step.x0.abs().max()) for step in generate.sample(tiny_model, REQUESTS, settings.plan(), helpers))
        for settings in (
            dataclasses.replace(FAST, **to_dog),
            dataclasses.replace(FAST, **to_dog, threshold=kind, threshold_bound=0.3),
        )
    )
    with pytest.raises(UserError, match="has not been opened; pass helpers=open_helpers"):
        next(generate.sample(tiny_model, REQUESTS, Settings(**to_dog).plan()))
    assert free > 0.4 and bound <= 0.3


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_threshold(tiny_model: LatentDiffusion, kind: str) -> None:
    assert torch.equal(draw(tiny_model, threshold=kind, threshold_bound=1e6), draw(tiny_model))
    for step in generate.sample(
        tiny_model, REQUESTS, dataclasses.replace(FAST, threshold=kind, threshold_bound=0.3).plan()
    ):
        assert float(step.x0.abs().max()) <= 0.3
    usual = dataclasses.replace(FAST, threshold=kind, cfg=50.0)
    largest = [float(step.x0.abs().max()) for step in generate.sample(tiny_model, REQUESTS, usual.plan())]
    assert max(largest) == pytest.approx(4.0)


def test_all_together_and_each_picture_by_itself(tiny_model: LatentDiffusion, classifier: str) -> None:
    everything = {"classifier": classifier, "classifier_class": "cat", "perp_negative": 1.0, "threshold": "dynamic"}
    together = draw(tiny_model, NEGATIVE, **everything)
    alone = torch.cat([draw(tiny_model, [request], **everything) for request in NEGATIVE])
    assert apart(together, alone) < 1e-3 and bool(together.isfinite().all())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(perp_negative=-1.0), "0 or more"),
        (Settings(perp_negative=1.0, guide_model="icons"), "choose one of the two"),
        (Settings(classifier="here"), "give both"),
        (Settings(classifier_class="cat"), "give both"),
        (Settings(classifier="here", classifier_class="cat", classifier_scale=float("nan")), "finite"),
        (Settings(classifier_scale=3.0), "name the classifier"),
        (Settings(threshold="dynamc"), "did you mean 'dynamic'"),
        (Settings(threshold="static", threshold_bound=0.0), "positive"),
        (Settings(threshold_bound=2.0), "static or dynamic with it"),
    ],
)
def test_settings_that_make_no_sense(settings: Settings, words: str) -> None:
    with pytest.raises(UserError, match=words):
        settings.check()


def test_guides_that_do_not_fit(tiny_model: LatentDiffusion, classifier: str, worse: str, tmp_path: Path) -> None:
    def refused(model: LatentDiffusion, requests: list[Request] = REQUESTS, **changes: Any) -> str:
        with pytest.raises(UserError) as error:
            draw(model, requests, **changes)
        return str(error.value)

    assert "there is no model" in refused(tiny_model, guide_model=str(tmp_path / "nothing"))
    to_cow = {"classifier": classifier, "classifier_class": "cow"}
    assert "no class 'cow'" in refused(tiny_model, **to_cow)
    assert "there is no classifier" in refused(tiny_model, **{**to_cow, "classifier": str(tmp_path / "nothing")})
    assert "train_noisy_classifier" in refused(tiny_model, **{**to_cow, "classifier": str(tmp_path)})
    assert "place of the negative prompt" in refused(tiny_model, NEGATIVE, guide_model=worse)

    codec = copy.deepcopy(tiny_model.codec)
    assert codec.autoencoder is not None
    codec.autoencoder.encoder.conv_in.weight.mul_(-1)
    stranger = dataclasses.replace(tiny_model, codec=codec)
    assert "another autoencoder" in refused(stranger, guide_model=worse)
    assert "another autoencoder" in refused(stranger, classifier=classifier, classifier_class="cat")


def test_what_stands_beside_a_model_is_read_once(tiny_model: LatentDiffusion, classifier: str, worse: str) -> None:
    """A loop of txt2img opens no file after its first turn, neither the guide model's nor the classifier's."""
    model, opened = dataclasses.replace(tiny_model), []
    settings = dataclasses.replace(FAST, guide_model=worse, classifier=classifier, classifier_class="dog")
    sys.addaudithook(lambda event, given: opened.append(given[0]) if event == "open" and watching else None)
    watching = False
    first = model.txt2img("a cat", settings=settings)
    watching = True
    again = model.txt2img("a cat", settings=settings)
    other = model.txt2img("a dog", settings=dataclasses.replace(settings, classifier_class="cat"))
    watching = False
    assert opened == [] and torch.equal(first, again) and not torch.equal(first, other)


# ---------------------------------------------------------------- in the picture, and from the command line


def test_the_command_and_reproducing_what_it_drew(
    tiny_model: LatentDiffusion,
    tiny_checkpoint: Path,
    classifier: str,
    worse: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cli(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        code = 0
        try:
            run(runpy.run_path(SCRIPT)["main"])
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().err

    own = Path(shutil.copytree(classifier, tmp_path / "classifier"))
    guided = ["--guide-model", worse, "--classifier", own, "--classifier-class", "dog", "--classifier-scale", 2]
    guided += ["--threshold", "dynamic", "--threshold-bound", 2.5]
    run_of = ["--model", tiny_checkpoint, "--device", "cpu", "--steps", 3, "--cfg", 2, "--out", tmp_path / "out"]
    assert cli("--prompt", "a cat", *guided, *run_of) == (0, "")
    first = tmp_path / "out" / "00000.png"
    written = image_io.read_metadata(first)
    assert set(written["guides"]) == {"guide_model", "classifier"} and written["threshold_bound"] == 2.5
    assert cli("--reproduce", first, "--out", tmp_path / "again") == (0, "")
    assert (tmp_path / "again" / "00000.png").read_bytes() == first.read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "notices", property(lambda self: (f"{self.path.name} is odd",)))
        code, said = cli("--reproduce", first, "--out", tmp_path / "again")
    assert code == 0 and said.splitlines() == ["warning: tiny is odd", "warning: worse is odd"]

    settings = provenance.read(first).settings
    assert (settings.guide_model, settings.classifier_class, settings.threshold) == (worse, "dog", "dynamic")
    made = open_helpers(tiny_model, settings.plan()).classifiers[str(own)]
    made.linear_out.weight.mul_(2)
    save_noisy_classifier(made, own)
    code, said = cli("--reproduce", first, "--out", tmp_path / "again")
    assert code == 0 and "the classifier is not the one" in said

    assert cli("--prompt", "a cat", "--classifier", own, *run_of)[1].startswith("error: a classifier needs the class")
    code, said = cli("--reproduce", first, "--classifier-class", "cat", "--out", tmp_path / "again")
    assert code == 1 and "--classifier-class does not go with --reproduce" in said
