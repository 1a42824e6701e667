"""The training of a diffusion model's network, a LoRA of it or a word, whichever it is: DiffusionStage.

It joins a model, inputs (inputs.py), an objective (objectives.py) and what is trained; nothing in it depends on which
these are. stage_two.py makes the stage of scripts/train_diffusion.py, embedding.py that of a word.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from ldm import generate
from ldm.conditioning.condition import Condition
from ldm.config import DataConfig, DiffusionLossConfig, FiguresConfig, LoopConfig, OptimizerConfig, SampleConfig
from ldm.data.latents import LatentBatch
from ldm.data.loader import Batch, validation_batches
from ldm.diffusion import Denoiser, draw_levels
from ldm.diffusion.parameterization import per_picture
from ldm.errors import UserError
from ldm.image_io import grid, save_png
from ldm.jobs import Settings, of_prompts
from ldm.latent_diffusion import LatentDiffusion
from ldm.model import Model
from ldm.notices import PromptNotice
from ldm.training.draws import Draws
from ldm.training.fewer_steps import Teacher
from ldm.training.inputs import Inputs
from ldm.training.meters import EACH_LOSS
from ldm.training.objectives import Nets, Objective, output_of, regress, relative_error
from ldm.training.preflight import check_validation, without_effect
from ldm.training.stage import Batches, Judge, Player

VALIDATION_SAMPLES = 512  # held-out samples of the validation loss, at most
COMMON_LEVELS = DiffusionLossConfig(levels="logit_normal")  # of the figure that compares all trainings


@dataclass(frozen=True)
class Course:
    """What a training of a diffusion model reads, and what it shows on its way."""

    open_batches: Callable[[], Batches]
    data: DataConfig
    loop: LoopConfig
    loss: DiffusionLossConfig  # also of the validation
    sample: SampleConfig
    drawing: Settings  # of the sample
    figures: FiguresConfig = FiguresConfig()
    latents: str = ""  # where they are, encoded beforehand
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Trained:
    """What of a model is trained: as the player "unet" its network or a LoRA in its place, as "word" an encoder of
    texts, of tokens (B, L)."""

    player: str
    module: nn.Module
    optimizer: OptimizerConfig
    export: Callable[[Path, bool], None]  # into a folder, of a run that is finished or not
    about: tuple[str, ...] = ()  # lines of the plan


class DiffusionStage:
    """The training of a part of `model` on this process' share of the data. Process 0 has `check`: it raises UserError
    at once unless what the end of the run needs is available. `held_out`: the loss of the validation, where it is not
    w(sigma) |D - x0|^2."""

    judge: Judge | None = None

    def __init__(
        self,
        model: LatentDiffusion,
        inputs: Inputs,
        objective: Objective,
        trained: Trained,
        course: Course,
        teacher: Teacher | None = None,
        held_out: Objective | None = None,
        check: bool = True,
    ):
        self.model, self.inputs, self.objective = model, inputs, objective
        self.trained, self.course, self.teacher = trained, course, teacher
        plain = dataclasses.replace(course.loss, stratified=False, offset_noise=0.0, input_perturbation=0.0)
        self.held_out = held_out or regress(model.law, plain)
        self.players = {trained.player: Player(trained.module, trained.optimizer)}
        self.notices, self._batches = list(course.notices), cache(course.open_batches)
        if check:
            check_validation(course.data, model.encoder.rows)
            self._check_end()

    @property
    def batches(self) -> Batches:
        """Of pictures, or of latents encoded beforehand. Opened when they are first asked for: an export needs none."""
        return self._batches()

    def _check_end(self) -> None:
        """Raise UserError unless the pictures and figures asked for are possible; notes what to know of them."""
        course, sample = self.course, self._sample
        self.notices += without_effect(self.model.config, course.data, self.trained.optimizer, course.loop, course.loss)
        if sample != course.sample:
            why = "it draws after a depth map alone" if self.inputs.takes == "depth" else "the model takes none"
            self.notices.append(f"sample.prompts are not drawn, for {why}")
        if sample.prompts or sample.labels:
            self.notices += _check_pictures(self.model, sample, course.drawing, course.loop.seed)
        elif sample == course.sample and (self.model.text is not None or self.model.encoder.classes):
            named = "sample.labels" if self.model.text is None else "sample.prompts"
            self.notices.append(f"no pictures are drawn on the way, for {named} is empty")
        if course.figures.pictures:
            _check_figures(course, self.model.device.type)

    def describe(self) -> list[str]:
        course, law = self.course, self.model.law
        c, h, w = self.model.codec.latent_shape(course.data.size, course.data.size)
        target = law.parameterization.name + (" with learned variance" if law.learned_variance else "")
        levels = ("stratified " if course.loss.stratified else "") + course.loss.levels
        assert self.model.config.schedule is not None
        beside = {"mask": ", beside it a mask and the masked picture's latent", "depth": ", beside it a depth map"}
        return [
            f"latent      {c} x {h} x {w}, {'precomputed' if course.latents else 'encoded on the fly'}"
            + beside.get(self.inputs.takes, ""),
            f"noise       {self.model.config.schedule.kind}, sigma {law.schedule.sigma_min:.4g} to "
            f"{law.schedule.sigma_max:.4g}; levels {levels}, weight {course.loss.weight}, {target}; "
            f"caption dropout {course.loss.caption_dropout:g}"
            + (f", of each tower {course.loss.tower_dropout:g}" if course.loss.tower_dropout else "")
            + (f"; the lowest {course.loss.lowest:.0%} of the levels alone" if course.loss.lowest < 1 else ""),
            *self.trained.about,
            *(f"note        {notice}" for notice in self.notices),
        ]

    def losses(
        self, batch: Batch | LatentBatch, draws: Draws, step: int, networks: Mapping[str, nn.Module]
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        loss = self.course.loss
        x0, told = self.inputs(batch, draws, loss.caption_dropout, loss.tower_dropout, networks.get("word"))
        average = self.players["unet"].average if "unet" in self.players else None
        nets = Nets(networks.get("unet", self.model.unet), average, self._taught(batch, told, draws))
        each, logs = self.objective(nets, x0, told, draws)
        loss = each.mean()
        yield self.trained.player, loss, {"loss": loss, EACH_LOSS: each, **logs}

    def _taught(self, batch: Batch | LatentBatch, told: Condition, draws: Draws) -> Denoiser | None:
        return None if self.teacher is None else self.teacher(told, self.inputs.untold(batch, told, draws))

    def validate(self) -> dict[str, float]:
        """Two means over held-out samples, whose noise and level are the same at every call.

        `validation/loss` is w(sigma) |D - x0|^2 on plain noise, or the objective's own loss where the network is taught
        by a teacher or by itself. `validation/error` is (1 + 1 / sigma^2) |D - x0|^2 with
        ln sigma ~ N(0, 1): it means the same for every schedule, target, weight and draw, and is 1 for a denoiser that
        knows nothing but that data have zero mean and unit variance. Then the figures of scripts/evaluate.py on few
        pictures, if they are asked for.
        """
        course, law, network = self.course, self.model.law, self.model.unet
        if not course.data.validation:
            return self._figures()
        loss, error, count = 0.0, 0.0, 0
        for batch in validation_batches(course.data, course.loop.global_batch, self.model.encoder.rows):
            draws = Draws(course.loop.seed, "validation", batch.key, self.inputs.device)
            x0, told = self.inputs(batch, draws)
            nets = Nets(network, teacher=self._taught(batch, told, draws))
            loss += float(self.held_out(nets, x0, told, draws)[0].sum())
            n = draws.normal("noise", x0.shape[1:])
            sigma = draw_levels(COMMON_LEVELS, law.schedule, draws.uniform("common level"))
            output = output_of(network, law, x0 + per_picture(sigma, x0) * n, sigma, told)
            error += float(relative_error(output, x0, n, sigma, law).sum())
            count += len(batch.key)
            if count >= VALIDATION_SAMPLES:
                break
        return {"validation/loss": loss / count, "validation/error": error / count} | self._figures()

    def _figures(self) -> dict[str, float]:
        if not self.course.figures.pictures or self.model.text is None:  # the latter is refused at the start
            return {}
        from ldm.metrics.watch import watch

        return watch(self.model, self.course.figures, self.course.data, self.course.drawing)

    @property
    def _sample(self) -> SampleConfig:
        """What is drawn on the way: no prompts of a model that takes none, and nothing that would need a depth map."""
        sample = self.course.sample
        if self.inputs.takes == "depth":
            return dataclasses.replace(sample, prompts=(), labels=())
        return sample if self.model.text is not None else dataclasses.replace(sample, prompts=())

    def draw(self, output: Path, step: int) -> None:
        """One picture for each prompt and label of `sample`, always from the same noise."""
        sample, seed = self._sample, self.course.loop.seed
        if not sample.prompts and not sample.labels:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptNotice)  # the plan has said it
            image = self.model.txt2img(
                sample.prompts or "", label=sample.labels or None, seed=seed, settings=self.course.drawing
            )
        save_png(grid(image.cpu(), columns=min(8, len(image))), output / "samples" / f"{step:08d}.png", {})

    def export(self, output: Path, finished: bool) -> None:
        self.trained.export(output, finished)


def _check_figures(course: Course, device: str) -> None:
    """Raise UserError unless the figures that are asked for could be measured."""
    from ldm.metrics.watch import ready

    try:
        ready(course.figures, course.data, course.drawing, device)
    except UserError as error:
        raise UserError(f"the figures of figures.pictures={course.figures.pictures} cannot be told: {error}") from error


def _check_pictures(model: Model, sample: SampleConfig, drawing: Settings, seed: int) -> Sequence[str]:
    """Raise UserError unless `model` could draw the run's grids; what a reader should know of their prompts."""
    try:
        requests = of_prompts(sample.prompts or "", seed=seed, label=sample.labels or None)
        generate.make_sigmas(model, drawing.of(model.config.drawing).plan())
        return generate.prompt_notices(model, requests)
    except UserError as error:
        given = "sample.prompts" if sample.prompts else "sample.labels"
        raise UserError(f"the pictures of {given} cannot be drawn: {error}") from error
