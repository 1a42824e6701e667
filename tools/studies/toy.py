"""The plane: forward process, score field, Langevin and ODE paths, by the product's own losses and samplers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import Denoiser, Schedule, make_law, precondition
from ldm.files import atomic_write_bytes
from ldm.metrics.plots import new_figure, png
from ldm.plane.energy import energy_score
from ldm.plane.score_matching import Score
from ldm.plane.toy import DISTRIBUTIONS, SHAPE, train_denoiser, train_energy, train_score
from ldm.sampling import SAMPLERS, BrownianPath, NoiseStream, Sampler, finish, make_grid, start

SHOWN = "two_moons"
SHOWN_PATHS = 40
OF_SCORES = 0.3  # the level at which scores are learned without a denoiser
EDGE = 3.2  # of the pictures' square


def run(folder: Path, quick: bool) -> None:
    """Train the toys, then write toy.png and the animation toy.gif. Raises UserError without matplotlib."""
    law = make_law(ScheduleConfig(kind="cosine"), "v")
    schedule = law.schedule
    network = train_denoiser(DISTRIBUTIONS[SHOWN], law, steps=800 if quick else 6000)
    denoiser = precondition(network, law)
    points, steps = (300, 20) if quick else (1500, 60)
    langevin = SAMPLERS["langevin"](moves=10, step_size=0.2)
    paths = {
        "Langevin, annealed": walk(langevin, denoiser, schedule, 20 if quick else 30, points, "stream"),
        "DDPM": walk(SAMPLERS["ddpm"](), denoiser, schedule, steps, points, "path"),
        "the flow, Heun": walk(SAMPLERS["heun"](), denoiser, schedule, steps, points, "stream"),
    }
    learned = {
        f"{name} score matching": train_score(DISTRIBUTIONS[SHOWN], name, OF_SCORES, 150 if quick else 1500)[0]
        for name in ("denoising", "implicit", "sliced")
    }
    energy, chains = train_energy(DISTRIBUTIONS[SHOWN], 200 if quick else 800)
    learned["energy by likelihood, its chains"] = energy_score(energy)
    draw_panels(denoiser, schedule, paths, learned, chains.state.flatten(1), folder)
    draw_animation(denoiser, schedule, paths, folder / "toy.gif", 10 if quick else 30)
    data = DISTRIBUTIONS[SHOWN](1500, torch.Generator().manual_seed(1)).flatten(1)
    for name, states in paths.items():
        far = torch.cdist(states[-1], data).amin(1).mean()
        print(f"{name:20} {points} points, on the mean {far:.3f} from the nearest of {len(data)} of the data")
    print(f"wrote toy.png and toy.gif into {folder}")


def walk(sampler: Sampler, denoiser: Denoiser, schedule: Schedule, steps: int, points: int, noise: str) -> list[Tensor]:
    """The states z = alpha x (points, 2) from pure noise to data."""
    sigmas = make_grid(schedule, steps, "exponential")
    kind = BrownianPath if noise == "path" else NoiseStream
    stream = kind(list(range(points)), SHAPE)
    x = start(stream.initial(), schedule, sigmas)
    states = [finish(x, schedule, sigmas[:1])]
    with torch.no_grad():
        for step in sampler(denoiser, x, sigmas, stream):
            states.append(finish(step.x, schedule, torch.tensor([step.sigma_next])))
    return [state.flatten(1) for state in states]


def draw_panels(
    denoiser: Denoiser,
    schedule: Schedule,
    paths: dict[str, list[Tensor]],
    learned: dict[str, Score],
    chains: Tensor,
    folder: Path,
) -> None:
    """Above the forward process and the score on it; then the ways back; below the scores that are learned otherwise,
    the last one an energy's, with the `chains` (n, 2) that it was learned by."""
    figure = new_figure(2.6 * 4, 2.7 * 3)
    data, n = _points(1500)
    for place, sigma in enumerate((0.0, 0.4, 1.5), start=1):
        axes = _panel(figure, 3, 4, place, f"forward, sigma {sigma:g}")
        _forward(axes, denoiser, schedule, sigma, 1500)
    axes = _panel(figure, 3, 4, 4, "the score, sigma 0.1")
    axes.scatter(*data.flatten(1).T, s=2, alpha=0.2)
    _arrows(axes, *_score_of(denoiser, schedule, 0.1))
    for place, (title, states) in enumerate(paths.items(), start=5):
        axes = _panel(figure, 3, 4, place, title)
        ways = torch.stack(states)[:, :SHOWN_PATHS]
        for way in ways.unbind(1):
            axes.plot(*way.T, lw=0.6, alpha=0.6)
        axes.scatter(*states[-1].T, s=2, color="black", alpha=0.4)
    axes = _panel(figure, 3, 4, 8, "data")
    axes.scatter(*data.flatten(1).T, s=2, color="black", alpha=0.4)
    for place, (title, score) in enumerate(learned.items(), start=9):
        axes = _panel(figure, 3, 4, place, title)
        axes.scatter(*((data + OF_SCORES * n).flatten(1) if place < 12 else chains).T, s=2, alpha=0.2)
        _arrows(axes, score, 1.0)
    atomic_write_bytes(folder / "toy.png", png(figure))


def draw_animation(
    denoiser: Denoiser, schedule: Schedule, paths: dict[str, list[Tensor]], path: Path, frames: int
) -> None:
    """The forward process under the score, and the ways back beside it, as a GIF that waits at the end."""
    sigmas = torch.cat([torch.zeros(1), make_grid(schedule, frames, "exponential")[:-1].flip(0)]).tolist()
    pictures, points = [], len(next(iter(paths.values()))[0])
    for frame in range(frames + 1):
        figure = new_figure(2.6 * (1 + len(paths)), 2.7)
        _forward(_panel(figure, 1, 1 + len(paths), 1, "forward"), denoiser, schedule, sigmas[frame], points)
        for place, (title, states) in enumerate(paths.items(), start=2):
            axes = _panel(figure, 1, 1 + len(paths), place, title)
            axes.scatter(*states[frame * (len(states) - 1) // frames].T, s=3, alpha=0.5)
        pictures.append(Image.open(io.BytesIO(png(figure))).convert("P", palette=Image.Palette.ADAPTIVE, colors=32))
    buffer = io.BytesIO()
    waits = [80] * frames + [1500]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=waits, loop=0, optimize=True)
    atomic_write_bytes(path, buffer.getvalue())


def _points(count: int) -> tuple[Tensor, Tensor]:
    """(x0, n), each (count, 2, 1, 1), always the same."""
    x0 = DISTRIBUTIONS[SHOWN](count, torch.Generator().manual_seed(1))
    return x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))


def _forward(axes: Any, denoiser: Denoiser, schedule: Schedule, sigma: float, count: int) -> None:
    """z = alpha (x0 + sigma n), and the score there."""
    x0, n = _points(count)
    z = (x0 + sigma * n) * float(schedule.alpha(torch.tensor(sigma, dtype=torch.float64)))
    axes.scatter(*z.flatten(1).T, s=2, alpha=0.4)
    if sigma:
        _arrows(axes, *_score_of(denoiser, schedule, sigma))


def _score_of(denoiser: Denoiser, schedule: Schedule, sigma: float) -> tuple[Score, float]:
    """The score (D - x) / sigma^2, and alpha."""
    level = torch.tensor(sigma, dtype=torch.float64)
    return lambda x: (denoiser(x, level) - x) / sigma**2, float(schedule.alpha(level))


def _arrows(axes: Any, score: Score, alpha: float) -> None:
    """Of the score at x = z / alpha on a lattice of z, of length up to one lattice width."""
    line = torch.linspace(-EDGE, EDGE, 17, dtype=torch.float64) * 0.9
    z = torch.cartesian_prod(line, line)
    with torch.no_grad():
        found = score((z / alpha).reshape(-1, *SHAPE)).flatten(1)
    length = found.norm(dim=1, keepdim=True)
    arrows = found / length * length.clamp(max=float(length.median()) * 2) / float(length.median()) * 0.2
    axes.quiver(*z.T, *arrows.T, angles="xy", scale_units="xy", scale=1, width=0.004, color="tab:red")


def _panel(figure: Any, rows: int, columns: int, place: int, title: str) -> Any:
    axes = figure.add_subplot(rows, columns, place, aspect="equal", xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE))
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes
