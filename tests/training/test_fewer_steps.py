"""Objectives of fewer steps: students whose answer is known lose nothing, and in the plane they find it by training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from laws.closed_forms import three_clusters
from torch import Tensor, nn

import ldm
from ldm.conditioning.condition import Condition
from ldm.config import Consistency, ConsistencyTraining, DiffusionTraining, Halve, LoraConfig, SampleConfig
from ldm.diffusion import make_law
from ldm.diffusion.continuous import TIME_UNIT
from ldm.diffusion.fewer_steps import ddim_step, heun_step, huber_width, improved_index, merged, pseudo_huber
from ldm.diffusion.parameterization import per_picture
from ldm.errors import UserError
from ldm.model_config import DiffusionLossConfig, ScheduleConfig
from ldm.sampling import make_grid
from ldm.training.draws import Draws
from ldm.training.fewer_steps import make_objective
from ldm.training.objectives import Nets, Objective
from ldm.training.stage_two import diffusion_stage

from .test_combinations import PLAIN
from .test_stage_two import pixels, tower  # noqa: F401 (fixtures)
from .toys import CPU, LOOP, log_of, run

VE = make_law(ScheduleConfig(kind="ve", sigma_min=0.02, sigma_max=10.0), "edm")
NOTHING = Condition(vector=torch.zeros(512, 0))
CLUSTERS = three_clusters()


class Numbers:
    """Draws of one generator: fast, and the same at each run."""

    def __init__(self, count: int, step: int = 0) -> None:
        self.address, self.count = (0, step), count
        self.generator = torch.Generator().manual_seed(step)

    def normal(self, _: str, shape: Any) -> Tensor:
        return torch.randn(self.count, *shape, generator=self.generator)

    def uniform(self, _: str) -> Tensor:
        return torch.rand(self.count, generator=self.generator, dtype=torch.float64)


def teacher(x: Tensor, sigma: Tensor) -> Tensor:
    """The clusters' denoiser at a level for each row."""
    out = torch.empty_like(x)
    for level in sigma.unique():
        rows = sigma == level
        out[rows] = CLUSTERS.denoiser(x[rows].double(), level).to(x)
    return out


def objective(config: DiffusionTraining) -> Objective:
    return make_objective(config, VE, config.loss, cast(Any, nn.Identity()))[0]


def network_of(denoiser: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The network of VE that would be this denoiser: its output F, of x_in and the time that says ln sigma / 4."""
    says = VE.parameterization

    def network(x_in: Tensor, t: Tensor, told: Condition) -> Tensor:
        sigma = (4 * t.double() / TIME_UNIT).exp()
        assert says.c_in is not None
        c_in, skip, out = (part(sigma).view(-1, 1, 1, 1).float() for part in (says.c_in, says.c_skip, says.c_out))
        return (denoiser(x_in / c_in, sigma) - skip * x_in / c_in) / out

    return network


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_student_that_says_the_merged_word_loses_nothing(count: int) -> None:
    config = DiffusionTraining(
        objective=Halve(steps=4, merged=count, spacing="karras"),
        init="a teacher",
        loss=DiffusionLossConfig("truncated"),
    )
    grid = make_grid(VE.schedule, 4 * count, "karras")

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        i = (sigma[:, None] - grid).abs().argmin(1)
        assert bool((i % count == 0).all())  # its own levels are every second of the teacher's, where two are merged
        return merged(teacher, x, [grid[i + k] for k in range(count + 1)])

    x0 = CLUSTERS.draw(512, torch.Generator().manual_seed(1)).view(512, 1, 1, 2).float()
    learned, draws = objective(config), [cast(Draws, Numbers(512)) for _ in range(2)]
    same, logs = learned(Nets(network_of(student), teacher=teacher), x0, NOTHING, draws[0])
    other, _ = learned(Nets(network_of(teacher), teacher=teacher), x0, NOTHING, draws[1])
    (sigma,) = logs.values()
    assert {round(float(s), 4) for s in sigma} == {round(float(s), 4) for s in grid[: 4 * count : count]}
    assert float(same.max()) < 1e-6 and (count == 1 or float(other.mean()) > 1e-3)


@pytest.mark.parametrize("asked", [Halve(steps=4), Consistency(levels=4), ConsistencyTraining()])
def test_levels_stay_on_the_cpu_whatever_the_device(asked: Any) -> None:
    """They are float64, which not each device has (Apple's)."""
    seen: list[Tensor] = []

    def word(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return x

    class Elsewhere(Numbers):
        def normal(self, _: str, shape: Any) -> Tensor:
            return super().normal(_, shape).to("meta")

    def student(x: Tensor, t: Tensor, told: Condition) -> Tensor:
        return x + per_picture(t, x)

    x0, draws = torch.zeros(4, 1, 1, 2, device="meta"), cast(Draws, Elsewhere(4))
    nets = Nets(student, teacher=word)
    loss, logs = objective(DiffusionTraining(objective=asked, init="a teacher"))(nets, x0, NOTHING, draws)
    assert loss.device.type == "meta" and {each.device.type for each in (*seen, *logs.values())} == {"cpu"}


MEAN, DEVIATION = 0.7, 0.5


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of N(MEAN, DEVIATION^2)."""
    return MEAN + per_picture(DEVIATION**2 / (DEVIATION**2 + sigma**2), x) * (x - MEAN)


def gaussians_end(x: Tensor, sigma: Tensor) -> Tensor:
    """The consistency function of its flow, on which distances from the mean go as the noisy data's deviation."""
    return MEAN + per_picture(DEVIATION / (DEVIATION**2 + sigma**2).sqrt(), x) * (x - MEAN)


@pytest.mark.parametrize(("solver", "skip"), [("ddim", 1), ("ddim", 3), ("ddim", 20), ("heun", 1)])
def test_consistency_compares_a_level_with_that_so_many_below(solver: Any, skip: int) -> None:
    """The loss of the true consistency function in closed form: what the teacher's step misses of the flow."""
    levels = 6
    config = DiffusionTraining(
        objective=Consistency(levels=levels, skip=skip, spacing="karras", solver=solver), init="a teacher"
    )
    x0 = torch.full((512, 1, 1, 2), MEAN) + DEVIATION * torch.randn(512, 1, 1, 2)
    nets = Nets(network_of(gaussians_end), teacher=gaussian)
    found, logs = objective(config)(nets, x0, NOTHING, cast(Draws, Numbers(512)))
    again, grid = Numbers(512), make_grid(VE.schedule, levels, "karras")
    i = (again.uniform("level") * levels).long()
    s, r = grid[i], grid[[min(int(place) + skip, levels) for place in i]]
    assert [torch.equal(each, s) for each in logs.values()] == [True]
    x = x0 + per_picture(s, x0) * again.normal("noise", (1, 1, 2))
    here, there = (DEVIATION / (DEVIATION**2 + level**2).sqrt() for level in (s, r))
    if solver == "ddim":
        gain = DEVIATION**2 / (DEVIATION**2 + s**2)
        below = gain + (1 - gain) * r / s
    else:
        below = 1 + (r - s) * s / (DEVIATION**2 + s**2)
        second = r * below / (DEVIATION**2 + r**2)
        below = torch.where(r > 0, 1 + (r - s) * (s / (DEVIATION**2 + s**2) + second) / 2, below)
    wanted = pseudo_huber(per_picture(here - there * below, x) * (x - MEAN), huber_width(2))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert float(wanted.max()) > 1e-3


def test_consistency_training_compares_two_levels_of_one_noise() -> None:
    """The same, of both along x0 + sigma n, over the distance of the levels; the number of levels follows the run."""
    asked = ConsistencyTraining(first_levels=4, last_levels=16)
    config = DiffusionTraining(objective=asked, loop=replace(LOOP, steps=100))
    learned = objective(config)
    for step, count in ((0, 4), (40, 8), (99, 16)):
        x0 = torch.full((512, 1, 1, 2), MEAN) + DEVIATION * torch.randn(512, 1, 1, 2)
        found, _ = learned(Nets(network_of(gaussians_end)), x0, NOTHING, cast(Draws, Numbers(512, step)))
        again, grid = Numbers(512, step), make_grid(VE.schedule, count, "karras")
        i = improved_index(again.uniform("level"), grid)
        n = again.normal("noise", (1, 1, 2))
        s, r = grid[i], grid[i + 1]
        here, there = (
            per_picture(DEVIATION / (DEVIATION**2 + level**2).sqrt(), x0) * (x0 + per_picture(level, x0) * n - MEAN)
            for level in (s, r)
        )
        wanted = pseudo_huber(here - there, huber_width(2)) / (s - r)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5, check_dtype=False)


def test_a_step_of_the_teacher_leaves_from_the_students_own_level() -> None:
    """Swapped levels, or another sign of the step, move the teacher up the flow: it is then further from the mean."""
    x, s, r = torch.full((1, 1, 1, 2), 5.0), torch.tensor([4.0]), torch.tensor([1.0])
    for advance in (ddim_step, heun_step):
        assert float((advance(gaussian, x, s, r) - MEAN).abs().max()) < float((x - MEAN).abs().max())


class Small(nn.Module):
    """A denoiser's network in the plane."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, x: Tensor, t: Tensor, told: Condition) -> Tensor:
        time = t[:, None] / 1000
        flat = torch.cat([x.flatten(1), time, (3 * time).sin()], dim=1)
        return self.layers(flat).view(x.shape)


def flows_end(x: Tensor, sigma: float) -> Tensor:
    """Where the flow through x (B, 1, 1, 2) at sigma ends, by 400 steps of Heun in float64."""
    levels = sigma * torch.linspace(1, 0, 401, dtype=torch.float64) ** 3
    for s, r in pairwise(levels):
        x = heun_step(lambda x, s: CLUSTERS.denoiser(x, s[0]), x, s.expand(len(x)), r.expand(len(x)))
    return x


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "within"), [("consistency", 0.12), ("consistency_training", 0.2)])
def test_in_the_plane_a_student_finds_the_flows_end(kind: str, within: float) -> None:
    """Clusters 1.5 to 2.5 apart, of deviation 0.5. An ordinary denoiser, which says the mean of where x may come from,
    is 0.7 off at this level."""
    asked = (
        Consistency(levels=24, spacing="karras", solver="heun")
        if kind == "consistency"
        else ConsistencyTraining(first_levels=8, last_levels=64)
    )
    steps = 2000
    config = DiffusionTraining(objective=asked, init="a teacher", loop=replace(LOOP, steps=steps))
    student, loss = Small(), objective(config)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x0 = CLUSTERS.draw(256, generator).view(256, 1, 1, 2).float()
        each, _ = loss(Nets(student, teacher=teacher), x0, NOTHING, cast(Draws, Numbers(256, step)))
        optimizer.zero_grad()
        each.mean().backward()
        optimizer.step()
        rate.step()
    x0 = CLUSTERS.draw(512, generator).view(512, 1, 1, 2)
    sigma = torch.full((512,), 2.0, dtype=torch.float64)
    x = x0 + 2.0 * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        found = VE.denoised(student(*VE.input(x, sigma), NOTHING), x, sigma)
    end = flows_end(x, 2.0)
    error = float((found - end).flatten(1).norm(dim=1).mean())
    mean_error = float((CLUSTERS.denoiser(x, sigma[0]) - end).flatten(1).norm(dim=1).mean())
    print(f"{kind}: {error:.3f} from the flow's end, the denoiser {mean_error:.3f}")
    assert error < within < 0.5 * mean_error


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"objective": Halve()}, r"objective\.kind=halve has the model of init as its teacher; set init=PATH"),
        ({"objective": ConsistencyTraining(), "parameterization": "x0"}, r"predicts x0 is no consistency function"),
        (
            {"objective": ConsistencyTraining(), "learned_variance": True},
            r"objective\.kind=consistency_training teaches no variance; set learned_variance=false",
        ),
    ],
)
def test_what_cannot_be_taught_is_refused_at_the_start(asked: dict[str, Any], words: str) -> None:
    channels = 2 * PLAIN.model.out_channels if asked.get("learned_variance") else PLAIN.model.out_channels
    with pytest.raises(UserError, match=words):
        diffusion_stage(replace(PLAIN, model=replace(PLAIN.model, out_channels=channels), **asked), 0, 1, CPU)


@pytest.mark.parametrize(
    "asked",
    [Halve(steps=2, cfg=2.0), Consistency(levels=8, cfg=2.0), ConsistencyTraining(first_levels=2, last_levels=8)],
    ids=lambda it: it.kind,
)
def test_each_trains_by_the_ordinary_way_and_draws_as_it_is_meant_to(
    asked: Any,
    pixels: DiffusionTraining,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A teacher is trained, then taught: the student begins as the teacher, learns, and is a model like any other; the
    teacher stays as it was."""
    first = replace(pixels, loop=replace(LOOP, steps=4, save_every=4), sample=SampleConfig())
    run(diffusion_stage(first, 0, 1, CPU), first.loop, tmp_path / "teacher", first)
    init = {} if isinstance(asked, ConsistencyTraining) else {"init": str(tmp_path / "teacher"), "text": ""}
    config = replace(first, objective=asked, sample=SampleConfig(("a cat",), steps=2), **init)
    stage = diffusion_stage(config, 0, 1, CPU)
    network = nn.Identity() if stage.teacher is None else cast(Any, stage.teacher).args[0]
    taught = {name: weight.clone() for name, weight in network.state_dict().items()}
    run(stage, config.loop, tmp_path / "student", config)
    losses = [line["loss"] for line in log_of(tmp_path / "student") if "loss" in line]
    assert losses and all(loss > 0 for loss in losses) and (tmp_path / "student" / "samples" / "00000004.png").exists()
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, taught[name])
    assert ldm.load(tmp_path / "student", device="cpu").txt2img("a cat", cfg=1, steps=2, sampler="lcm").isfinite().all()


def test_a_lora_is_taught_by_the_model_that_it_changes(pixels: DiffusionTraining, tmp_path: Path) -> None:  # noqa: F811
    """The teacher is the network without the LoRA, whatever the LoRA has become."""
    first = replace(pixels, loop=replace(LOOP, steps=2, save_every=2), sample=SampleConfig())
    run(diffusion_stage(first, 0, 1, CPU), first.loop, tmp_path / "teacher", first)
    config = replace(
        first, objective=Consistency(levels=8), init=str(tmp_path / "teacher"), text="", lora=LoraConfig(rank=2)
    )
    stage = diffusion_stage(config, 0, 1, CPU)
    batch = next(iter(stage.batches))
    x0, told = stage.inputs(batch, draws := Draws(0, 0, batch.key))
    assert stage.teacher is not None
    sigma = torch.ones(len(x0), dtype=torch.float64)
    before = stage.teacher(told, stage.inputs.untold(batch, told, draws))(x0, sigma)
    with torch.no_grad():
        for weight in stage.trained.module.parameters():
            weight.add_(0.1)
    after = stage.teacher(told, stage.inputs.untold(batch, told, draws))(x0, sigma)
    assert torch.equal(before, after)
