"""Stage two with each noise law, target, weight and level draw: it learns, and the checkpoint says what it is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ldm.api
from ldm.checkpoints import native
from ldm.config import DiffusionLossConfig, DiffusionTraining, ScheduleConfig
from ldm.data.latents import LatentBatch
from ldm.diffusion import draw_levels, make_parameterization, make_schedule
from ldm.errors import UserError
from ldm.training.draws import Draws
from ldm.training.objectives import relative_error, training_noise
from ldm.training.stage_two import diffusion_stage

from .toys import CPU, LOOP, PIXELS, log_of, run

PLAIN = replace(  # no captions, so no text tower, and as little else as trains
    PIXELS,
    model=replace(PIXELS.model, context_width=0, multipliers=(1,), attention_levels=()),
    data=replace(PIXELS.data, streams=2),
    loop=replace(LOOP, steps=16, save_every=16, validate_every=16),
)

TRAININGS = {  # every schedule, target, weight, draw and extra at least once
    "linear eps": ("linear", "eps", {}),
    "scaled_linear v": ("scaled_linear", "v", {"weight": "min_snr", "stratified": True}),
    "cosine x0": ("cosine", "x0", {"weight": "snr", "input_perturbation": 0.1}),
    "sigmoid score": ("sigmoid", "score", {"weight": "snr", "levels": "lognormal"}),
    "zero flow": ("zero", "flow", {"offset_noise": 0.1}),
    "vp eps": ("vp", "eps", {"weight": "elbo", "stratified": True}),
    "ve edm": ("ve", "edm", {"weight": "edm", "levels": "lognormal", "stratified": True}),
    "edm v": ("edm", "v", {"levels": "lognormal"}),
    "edm edm": ("edm", "edm", {"levels": "lognormal"}),
    "flow flow": ("flow", "flow", {"levels": "logit_normal"}),
    "linear eps learned": ("linear", "eps", {"variance_bound": 0.001}),
}


def settings(kind: str, target: str, loss: dict[str, object], learned: bool = False) -> DiffusionTraining:
    return replace(
        PLAIN,
        model=replace(PLAIN.model, out_channels=6 if learned else 3),
        schedule=ScheduleConfig(zero_terminal_snr=True) if kind == "zero" else ScheduleConfig(kind=kind),
        parameterization=target,
        sigma_data=0.5,
        learned_variance=learned,
        loss=replace(PLAIN.loss, **loss),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", TRAININGS)
def test_it_learns_and_says_what_it_is(name: str, tmp_path: Path) -> None:
    """16 steps: its own loss falls, and so does the error that all trainings share.

    The latter not for score, whose D = x + sigma^2 F is made of the network's errors where sigma is large.
    """
    config = settings(*TRAININGS[name], learned=name.endswith("learned"))
    stage = diffusion_stage(config, 0, 1, CPU)
    with torch.no_grad():
        before = stage.validate()
    run(stage, config.loop, tmp_path, config)
    (after,) = [line for line in log_of(tmp_path) if "validation/error" in line]
    assert after["validation/loss"] < 0.9 * before["validation/loss"]
    if config.parameterization != "score":
        assert after["validation/error"] < 0.9 * before["validation/error"]
    saved = native.read_config(tmp_path)
    assert (saved.schedule, saved.parameterization) == (config.schedule, config.parameterization)
    assert (saved.sigma_data, saved.learned_variance) == (0.5, config.learned_variance)


def test_a_checkpoint_from_before_these_settings_is_read_as_it_was_meant(tmp_path: Path) -> None:
    config = settings("scaled_linear", "v", {})
    stage = diffusion_stage(replace(config, sigma_data=1.0), 0, 1, CPU)
    stage.export(tmp_path, finished=True)
    file = tmp_path / "model.json"
    plain = json.loads(file.read_text())
    for name in ("sigma_data", "learned_variance"):
        del plain[name]
    for name in ("beta_min", "beta_max", "time_min", "sigma_min", "sigma_max"):
        del plain["schedule"][name]
    file.write_text(json.dumps(plain))
    assert native.read_config(tmp_path) == stage.model.config
    shipped = native.read_config(ldm.find.SHIPPED["icons"])
    assert (shipped.sigma_data, shipped.learned_variance, shipped.parameterization) == (1.0, False, "v")


# ---------------------------------------------------------------- noise and levels


KEYS = [f"sample{i}" for i in range(400)]


def test_plain_noise_is_what_it_was() -> None:
    draws = Draws(0, 3, KEYS[:5])
    n, seen = training_noise(DiffusionLossConfig(), draws, (3, 4, 4))
    assert torch.equal(n, draws.normal("noise", (3, 4, 4))) and torch.equal(n, seen)


def test_offset_noise_moves_whole_channels() -> None:
    """n = noise + 0.5 c with one normal c for each channel of each sample; variance within five standard errors."""
    draws = Draws(0, 3, KEYS)
    n, seen = training_noise(DiffusionLossConfig(offset_noise=0.5), draws, (3, 4, 4))
    offset = n - draws.normal("noise", (3, 4, 4))
    assert torch.equal(n, seen)
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), rtol=0, atol=1e-6)
    channels = offset[:, :, 0, 0]
    assert float(channels.var()) == pytest.approx(0.25, abs=5 * 0.25 * math.sqrt(2 / channels.numel()))
    assert float(torch.corrcoef(channels.T)[0, 1]) == pytest.approx(0, abs=5 / math.sqrt(len(channels)))


class Recorder(nn.Module):
    """Answers with `answer`, and remembers its inputs."""

    def __init__(self, answer: Tensor | float = 0.0) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, context: None) -> Tensor:
        self.seen.append((x, t))
        return torch.zeros_like(x) + self.answer


def test_input_perturbation_is_seen_and_not_asked_for() -> None:
    """The network's x has the variance 1 + g^2 of noise (Ning et al. 2023); a network that answers n has no loss."""
    config = settings("linear", "eps", {"input_perturbation": 0.4, "offset_noise": 0.1})
    stage = diffusion_stage(config, 0, 1, CPU)
    batch = next(iter(stage.batches))
    draws = Draws(0, 0, batch.key)
    n, seen = training_noise(config.loss, draws, (3, 8, 8))
    difference = (seen - n) / 0.4
    assert float(difference.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / n.numel()))
    network = Recorder(answer=n)
    ((_, loss, _),) = stage.losses(batch, draws, 0, {"unet": network})
    assert float(loss) < 1e-12
    x_in, t = network.seen[0]
    sigma = stage.model.law.schedule.sigma(t.double()).float().reshape(-1, 1, 1, 1)
    x0, _ = stage.inputs(batch, draws)
    torch.testing.assert_close(x_in, (x0 + sigma * seen) / (1 + sigma**2).sqrt(), rtol=0, atol=1e-4)


def test_validation_is_on_plain_noise_and_plain_levels() -> None:
    plain = diffusion_stage(settings("linear", "eps", {}), 0, 1, CPU)
    other = diffusion_stage(
        settings("linear", "eps", {"input_perturbation": 0.4, "offset_noise": 0.1, "stratified": True}), 0, 1, CPU
    )
    with torch.no_grad():
        assert plain.validate() == other.validate()


def test_strata_do_not_depend_on_micro_batches(tmp_path: Path) -> None:
    """One global batch in one piece or in four: the same times, each eighth once, and the same losses."""
    config = settings("vp", "v", {"stratified": True})
    losses = []
    for micro in (8, 2):
        loop = replace(config.loop, steps=3, micro_batch=micro, log_every=1)
        output = tmp_path / str(micro)
        run(diffusion_stage(replace(config, loop=loop), 0, 1, CPU), loop, output, config)
        losses.append([line["loss"] for line in log_of(output) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    stage, network = diffusion_stage(config, 0, 1, CPU), Recorder()
    batch = next(iter(stage.batches))
    list(stage.losses(batch, Draws(0, 0, batch.key), 0, {"unet": network}))
    share = (network.seen[0][1] - stage.model.law.schedule.t_min) / (
        stage.model.law.schedule.t_max - stage.model.law.schedule.t_min
    )
    assert sorted((share * 8).long().tolist()) == list(range(8))


def test_processes_hold_neighbouring_parts_of_the_global_batch() -> None:
    """What the places that the loop gives to strata rest upon."""
    whole = next(iter(diffusion_stage(PLAIN, 0, 1, CPU).batches)).key
    parts = [next(iter(diffusion_stage(PLAIN, rank, 2, CPU).batches)).key for rank in range(2)]
    assert [*parts[0], *parts[1]] == whole


@pytest.mark.parametrize("target", ["x0", "v", "edm"])
def test_the_common_error_of_a_denoiser_that_knows_nothing_is_1(target: str) -> None:
    """On N(0, I) data with D = x / (1 + sigma^2), its own best: by drawing, five standard errors."""
    generator = torch.Generator().manual_seed(0)
    x0, n = torch.randn(2, 500, 2, 6, 6, generator=generator)
    parameterization = make_parameterization(target)
    schedule = make_schedule(ScheduleConfig())
    sigma = draw_levels(DiffusionLossConfig(), schedule, torch.rand(500, generator=generator))
    level = sigma.float().reshape(-1, 1, 1, 1)
    best = (x0 + level * n) / (1 + level**2)
    output = best if target == "x0" else torch.zeros_like(x0)
    error = relative_error(output, x0, n, sigma, parameterization)
    assert error.shape == (500,)
    assert float(error.mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / x0.numel()))


# ---------------------------------------------------------------- learned variance, and what is refused


def test_both_halves_of_a_learned_variance_are_trained() -> None:
    config = settings("cosine", "v", {"variance_bound": 1.0}, learned=True)
    stage = diffusion_stage(config, 0, 1, CPU)
    batch = next(iter(stage.batches))
    ((_, loss, _),) = stage.losses(batch, Draws(0, 0, batch.key), 0, {"unet": stage.model.unet})
    loss.backward()
    gradient = stage.model.unet.conv_out.bias.grad
    assert gradient is not None and bool((gradient.abs() > 0).all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learned_variance": True}, r"3 input and 3 output .* set model.in_channels=3 model.out_channels=6"),
        ({"model": replace(PLAIN.model, out_channels=6)}, "6 output channels .* model.out_channels=3"),
        ({"parameterization": "eps", "schedule": ScheduleConfig(kind="flow")}, "eps cannot go with"),
        ({"sigma_data": 0.0}, "sigma_data must be above 0, not 0"),
        ({"loss": DiffusionLossConfig(weight="elbo", levels="lognormal")}, "set loss.levels=uniform"),
        ({"loss": DiffusionLossConfig(offset_noise=-1.0)}, "loss.offset_noise"),
        (
            {
                "learned_variance": True,
                "schedule": ScheduleConfig(kind="vp"),
                "model": replace(PLAIN.model, out_channels=6),
            },
            "learned_variance interpolates",
        ),
    ],
)
def test_nonsense_is_refused_before_anything_is_read(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        diffusion_stage(replace(PLAIN, **change), 0, 1, CPU)  # type: ignore[arg-type]


def test_cached_contexts_are_left_alone_by_a_network_without_captions() -> None:
    stage = diffusion_stage(PLAIN, 0, 1, CPU)
    batch = LatentBatch(
        torch.zeros(2, 6, 8, 8),
        torch.zeros(2, 7, 32),
        torch.zeros(2, 0),
        ["a", "b"],
        [0, 0],
        *[torch.zeros(2, 2)] * 2,
        *[[None] * 2] * 2,
    )
    x0, condition = stage.inputs(batch, Draws(0, 0, batch.key))
    assert x0.shape == (2, 3, 8, 8) and condition.context is None
