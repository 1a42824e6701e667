"""Students that are told their guidance scale, or have it taken in, and that say how they are to be drawn."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm
from ldm import provenance
from ldm.checkpoints.adapter_words import DRAWING
from ldm.checkpoints.architectures import LCM
from ldm.checkpoints.native import read_config
from ldm.checkpoints.reading import read_metadata
from ldm.conditioning.condition import Condition
from ldm.config import (
    Consistency,
    ConsistencyTraining,
    DiffusionLossConfig,
    DiffusionTraining,
    DrawingConfig,
    FiguresConfig,
    Halve,
    LoraConfig,
    Regress,
    SampleConfig,
    UNetConfig,
)
from ldm.diffusion import bind
from ldm.errors import UserError
from ldm.guidance import cfg
from ldm.jobs import Settings, of_prompts
from ldm.networks import AnyNetwork
from ldm.training.diffusion import DiffusionStage
from ldm.training.draws import Draws
from ldm.training.fewer_steps import drawn_by, student_of
from ldm.training.stage_two import diffusion_stage

from .test_stage_two import tower  # noqa: F401 (a fixture)
from .toys import CPU, LOOP, PIXELS, run

RANGE = (3.0, 13.0)
SHORT = replace(LOOP, steps=2, save_every=2)


@pytest.fixture(scope="module")
def teacher(tower: str, tmp_path_factory: pytest.TempPathFactory) -> DiffusionTraining:  # noqa: F811
    """What its students are trained by, with a model to begin with."""
    path = tmp_path_factory.mktemp("teacher")
    first = replace(PIXELS, text=tower, loop=SHORT, sample=SampleConfig())
    run(diffusion_stage(first, 0, 1, CPU), first.loop, path, first)
    return replace(first, init=str(path), text="", sample=SampleConfig(cfg=6.0))


def taught(stage: DiffusionStage, step: int = 0) -> tuple[Any, Condition, Condition, Any]:
    """A batch's latents and conditions, those without text, and the teacher's denoiser."""
    batch = next(iter(stage.batches))
    draws = Draws(0, step, batch.key)
    x0, told = stage.inputs(batch, draws)
    untold = stage.inputs.untold(batch, told, draws)
    assert stage.teacher is not None
    return x0, told, untold, stage.teacher(told, untold)


def network_of(stage: DiffusionStage) -> AnyNetwork:
    assert stage.teacher is not None
    return stage.teacher.args[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("asked", [Halve(steps=2, cfg_range=RANGE), Consistency(levels=8, cfg_range=RANGE)])
def test_the_teacher_is_guided_by_the_scale_that_the_student_is_told(asked: Any, teacher: DiffusionTraining) -> None:
    stage = diffusion_stage(replace(teacher, objective=asked), 0, 1, CPU)
    x0, told, untold, denoiser = taught(stage)
    scales = told.guidance
    assert scales is not None and scales.dtype == torch.float32  # not each device has float64
    assert bool(((scales >= 3) & (scales <= 13)).all()) and len(scales.unique()) == len(scales)
    other = taught(stage, 1)[1].guidance
    assert other is not None and not torch.equal(scales, other)
    network, law = network_of(stage), stage.model.law
    sigma = torch.full((len(x0),), 2.0, dtype=torch.float64)
    found = denoiser(x0, sigma)
    for row, scale in enumerate(scales.tolist()):
        plain = [replace(each, guidance=None)[row : row + 1] for each in (told, untold)]
        wanted = cfg(bind(network, plain, law), scale)(x0[row : row + 1], sigma[:1])
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-4, atol=1e-4)


def test_a_student_begins_as_its_teacher_whatever_it_is_told(
    teacher: DiffusionTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[Any]] = []

    def told_student(network: AnyNetwork, config: DiffusionTraining) -> AnyNetwork:
        read.append(weakref.ref(network))
        return student_of(network, config)

    monkeypatch.setattr("ldm.training.stage_two.student_of", told_student)
    stage = diffusion_stage(replace(teacher, objective=Consistency(levels=8, cfg_range=RANGE)), 0, 1, CPU)
    gc.collect()
    assert read[0]() is None  # there is its copy, the teacher
    x0, told, _, _ = taught(stage)
    t = torch.linspace(1, 900, len(x0))
    student, network = stage.model.unet, network_of(stage)
    assert torch.equal(student(x0, t, told), network(x0, t, replace(told, guidance=None)))
    assert isinstance(student.config, UNetConfig) and student.config.guidance_width == 256
    assert stage.model.config.unet == student.config and network.config != student.config


@pytest.mark.parametrize(
    "asked",
    [
        Regress(),
        Halve(steps=2, cfg_range=RANGE),
        Consistency(levels=8, solver="heun"),
        ConsistencyTraining(),
    ],
)
def test_a_step_is_taken_where_the_networks_are(asked: Any, teacher: DiffusionTraining) -> None:
    """On a device that, as a GPU does, refuses to compute with tensors of the CPU."""
    how = DiffusionLossConfig(caption_dropout=0.5, offset_noise=0.1, stratified=isinstance(asked, Regress))
    stage = diffusion_stage(replace(teacher, objective=asked, loss=how), 0, 1, CPU)
    there = torch.device("meta")
    stage.inputs = replace(stage.inputs, device=there)
    for network in (stage.model.unet, stage.model.encoder, *([network_of(stage)] if stage.teacher else [])):
        network.to(there)
    batch = next(iter(stage.batches))
    ((_, loss, _),) = stage.losses(batch, Draws(0, 0, batch.key, there), 0, {"unet": stage.model.unet})
    loss.backward()
    assert {parameter.grad.device for parameter in stage.model.unet.parameters() if parameter.grad is not None} == {
        there
    }


def test_guidance_first_then_halvings(teacher: DiffusionTraining, tmp_path: Path) -> None:
    """Meng et al. 2023: one step merged takes guidance in; then the student is the teacher, told what its own is."""
    first = replace(teacher, objective=Halve(steps=8, merged=1, cfg_range=RANGE))
    run(diffusion_stage(first, 0, 1, CPU), first.loop, tmp_path / "told", first)
    assert read_config(tmp_path / "told").drawing == DrawingConfig(6.0, 8, "ddim", "trailing")
    second = replace(first, init=str(tmp_path / "told"), objective=Halve(steps=4, cfg_range=RANGE))
    stage = diffusion_stage(second, 0, 1, CPU)
    x0, told, _, denoiser = taught(stage)
    rows: list[int] = []
    hook = network_of(stage).register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    sigma = torch.ones(len(x0), dtype=torch.float64)
    found = denoiser(x0, sigma)
    hook.remove()
    assert rows == [len(x0)]  # nothing is compared: it guides itself
    torch.testing.assert_close(found, bind(network_of(stage), [told], stage.model.law)(x0, sigma, 1)[0])
    run(stage, second.loop, tmp_path / "four", second)
    model = ldm.load(tmp_path / "four", device="cpu")
    assert model.config.told_guidance and model.config.drawing == DrawingConfig(6.0, 4, "ddim", "trailing")
    assert model.unet.guidance_embedding is not None  # type: ignore[union-attr]
    assert float(model.unet.guidance_embedding.weight.abs().max()) > 0  # type: ignore[union-attr]
    assert not torch.equal(model.txt2img("a cat"), model.txt2img("a cat", cfg=12.0))


@pytest.mark.parametrize(
    ("asked", "drawing"),
    [
        (Halve(steps=2, cfg=4.0), DrawingConfig(1.0, 2, "ddim", "trailing")),
        (Consistency(cfg=4.0), DrawingConfig(1.0, 4, "lcm", "lcm")),
        (Consistency(levels=1000, skip=20, steps=2), DrawingConfig(1.0, 2, "lcm", "trailing")),
        (Consistency(cfg_range=RANGE), DrawingConfig(6.0, 4, "lcm", "lcm")),
    ],
)
def test_a_model_says_how_it_is_drawn(
    asked: Any, drawing: DrawingConfig, teacher: DiffusionTraining, tmp_path: Path
) -> None:
    """Without a word it is drawn so; what is said goes before it; and the record has what was done."""
    config = replace(teacher, objective=asked, loop=replace(SHORT, steps=1))
    run(diffusion_stage(config, 0, 1, CPU), config.loop, tmp_path, config)
    model = ldm.load(tmp_path, device="cpu")
    assert model.config.drawing == drawing
    said = Settings(drawing.cfg, drawing.steps, drawing.sampler, drawing.spacing)
    assert torch.equal(model.txt2img("a cat", seed=3), model.txt2img("a cat", seed=3, settings=said))
    assert len(list(model.sample("a cat"))) == drawing.steps and len(list(model.sample("a cat", steps=3))) == 3
    if drawing.cfg == 1:
        with pytest.warns(ldm.api.PromptNotice, match="nothing is guided, so nothing comes of a negative prompt"):
            model.txt2img("a cat", negative="a dog")
    record = provenance.record(model, Settings(steps=3), of_prompts("a cat"), 0)
    assert [record[name] for name in ("cfg", "steps", "sampler")] == [drawing.cfg, 3, drawing.sampler]
    assert record["spacing"] == drawing.spacing


@pytest.mark.parametrize(
    ("asked", "drawing"),
    [
        (Halve(steps=1000, merged=1, cfg_range=RANGE), DrawingConfig(6.0)),  # no shorter than its teacher
        (Halve(steps=32, cfg=4.0), DrawingConfig(1.0, 32, "ddim", "trailing")),
        (Consistency(cfg_range=(7.0, 9.0)), DrawingConfig(7.0, 4, "lcm", "lcm")),  # the next scale that it knows
        (ConsistencyTraining(steps=2), DrawingConfig(1.0, 2, "lcm", "karras")),
        (DiffusionTraining().objective, DrawingConfig()),
    ],
)
def test_how_each_is_drawn(asked: Any, drawing: DrawingConfig) -> None:
    config = DiffusionTraining(objective=asked, sample=SampleConfig(cfg=6.0))
    assert drawn_by(config, LCM) == drawing
    assert drawn_by(replace(config, lora=LoraConfig(rank=2)), LCM) == (LCM if drawing == DrawingConfig() else drawing)


def test_the_figures_and_pictures_of_a_run_are_drawn_as_its_student_is(
    teacher: DiffusionTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sample.steps is 30: nobody would draw a student of two steps so."""
    import ldm.metrics.watch as watching

    asked: list[Settings] = []
    monkeypatch.setattr(watching, "watch", lambda model, figures, data, settings: asked.append(settings) or {})
    monkeypatch.setattr(watching, "ready", lambda *_: None)
    config = replace(teacher, objective=Halve(steps=2, cfg=4.0), figures=FiguresConfig(pictures=4))
    stage = diffusion_stage(config, 0, 1, CPU)
    stage._figures()
    (settings,) = asked
    plan = settings.of(stage.model.config.drawing).plan()
    assert (plan.steps, plan.sampler, plan.spacing, plan.guide.scale) == (2, "ddim", "trailing", 1.0)  # type: ignore[union-attr]
    usual = diffusion_stage(replace(config, objective=DiffusionTraining().objective), 0, 1, CPU)
    usual._figures()
    assert (asked[1].cfg, asked[1].steps) == (6.0, 30)


def test_a_lora_brings_how_it_is_drawn_along(teacher: DiffusionTraining, tmp_path: Path) -> None:
    """To a second model of the architecture of that which it was trained on too; and leaves it as it was."""
    config = replace(teacher, objective=Consistency(cfg=4.0, steps=3), lora=LoraConfig(rank=2, layers="all"))
    run(diffusion_stage(config, 0, 1, CPU), config.loop, tmp_path / "lora", config)
    file = tmp_path / "lora" / "lora.safetensors"
    assert DRAWING in read_metadata(file)
    second = replace(teacher, loop=replace(SHORT, seed=5))
    run(diffusion_stage(second, 0, 1, CPU), second.loop, tmp_path / "second", second)
    model = ldm.load(tmp_path / "second", device="cpu")
    with pytest.warns(ldm.api.CheckpointNotice, match="pictures are drawn at cfg 1 in 3 steps of lcm"):
        made = model.adapted(file)
    assert made.config.drawing == DrawingConfig(1.0, 3, "lcm", "lcm") and model.config.drawing == DrawingConfig()
    assert len(list(made.sample("a cat"))) == 3 and made.hash == model.hash


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": Halve(cfg_range=(13.0, 3.0))}, r"cfg_range is \[13\.0, 3\.0\]; give the lowest and the highest"),
        (
            {"objective": Halve(cfg_range=RANGE), "lora": LoraConfig(rank=2)},
            r"objective\.cfg_range needs a layer that a LoRA has no place for; set objective\.cfg",
        ),
    ],
)
def test_scales_that_cannot_be_told_are_refused(changes: Any, words: str, teacher: DiffusionTraining) -> None:
    with pytest.raises(UserError, match=words):
        diffusion_stage(replace(teacher, **changes), 0, 1, CPU)


def test_a_model_that_is_told_its_scale_is_trained_on_by_what_tells_it(
    teacher: DiffusionTraining, tmp_path: Path
) -> None:
    first = replace(teacher, objective=Consistency(levels=8, cfg_range=RANGE), loop=replace(SHORT, steps=1))
    run(diffusion_stage(first, 0, 1, CPU), first.loop, tmp_path, first)
    for asked in (DiffusionTraining().objective, Consistency(), ConsistencyTraining()):
        with pytest.raises(UserError, match=r"is told its guidance scale; say which .*cfg_range=\[3,13\]"):
            diffusion_stage(replace(first, init=str(tmp_path), objective=asked), 0, 1, CPU)
