"""The plane: forward process, score field, Langevin and ODE paths, by the product's own losses and samplers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import Denoiser, Schedule, make_parameterization, make_schedule, precondition
from ldm.errors import UserError
from ldm.files import atomic_write_bytes
from ldm.sampling import SAMPLERS, BrownianPath, NoiseStream, Sampler, finish, make_grid, start
from ldm.toy import LAWS, SHAPE, train_denoiser

LAW = "two_moons"
SHOWN_PATHS = 40
EDGE = 3.2  # of the pictures' square


def run(folder: Path, quick: bool) -> None:
    """Train the toy, then write toy.png and the animation toy.gif. Raises UserError without matplotlib."""
    schedule = make_schedule(ScheduleConfig(kind="cosine"))
    parameterization = make_parameterization("v")
    network = train_denoiser(LAWS[LAW], schedule, parameterization, steps=100 if quick else 6000)
    denoiser = precondition(network, schedule, parameterization)
    points = 300 if quick else 1500
    ode = walk(SAMPLERS["heun"](), denoiser, schedule, 20 if quick else 60, points, "stream")
    chain = walk(SAMPLERS["ddpm"](), denoiser, schedule, 20 if quick else 60, points, "path")
    langevin = walk(
        SAMPLERS["langevin"](moves=10, step_size=0.2), denoiser, schedule, 10 if quick else 30, points, "stream"
    )
    draw_panels(denoiser, schedule, {"Langevin, annealed": langevin, "DDPM": chain, "the flow, Heun": ode}, folder)
    draw_animation({"DDPM": chain, "the flow": ode}, folder / "toy.gif", 10 if quick else 30)
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


def draw_panels(denoiser: Denoiser, schedule: Schedule, paths: dict[str, list[Tensor]], folder: Path) -> None:
    """Above the forward process and the score on it; below the ways back."""
    figure = _figure(4, 2)
    data = LAWS[LAW](1500, torch.Generator().manual_seed(1))
    n = torch.randn(data.shape, generator=torch.Generator().manual_seed(2))
    for place, sigma in enumerate((0.0, 0.4, 1.5), start=1):
        axes = _panel(figure, 2, 4, place, f"forward, sigma {sigma:g}")
        level = torch.tensor(sigma, dtype=torch.float64)
        z = (data + sigma * n) * float(schedule.alpha(level))
        axes.scatter(*z.flatten(1).T, s=2, alpha=0.4)
        if sigma:
            _score(axes, denoiser, schedule, level)
    axes = _panel(figure, 2, 4, 4, "the score, sigma 0.1")
    axes.scatter(*data.flatten(1).T, s=2, alpha=0.2)
    _score(axes, denoiser, schedule, torch.tensor(0.1, dtype=torch.float64))
    for place, (title, states) in enumerate(paths.items(), start=5):
        axes = _panel(figure, 2, 4, place, title)
        ways = torch.stack(states)[:, :SHOWN_PATHS]
        for way in ways.unbind(1):
            axes.plot(*way.T, lw=0.6, alpha=0.6)
        axes.scatter(*states[-1].T, s=2, color="black", alpha=0.4)
    axes = _panel(figure, 2, 4, 8, "data")
    axes.scatter(*data.flatten(1).T, s=2, color="black", alpha=0.4)
    atomic_write_bytes(folder / "toy.png", _png(figure))


def draw_animation(paths: dict[str, list[Tensor]], path: Path, frames: int) -> None:
    """The points on their ways, side by side, as a GIF that waits at the end."""
    pictures = []
    for frame in range(frames + 1):
        figure = _figure(len(paths), 1)
        for place, (title, states) in enumerate(paths.items(), start=1):
            axes = _panel(figure, 1, len(paths), place, title)
            axes.scatter(*states[frame * (len(states) - 1) // frames].T, s=3, alpha=0.5)
        pictures.append(Image.open(io.BytesIO(_png(figure))).convert("P", palette=Image.Palette.ADAPTIVE, colors=32))
    buffer = io.BytesIO()
    waits = [80] * frames + [1500]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=waits, loop=0, optimize=True)
    atomic_write_bytes(path, buffer.getvalue())


def _score(axes: Any, denoiser: Denoiser, schedule: Schedule, sigma: Tensor) -> None:
    """Arrows of the score (D - x) / sigma^2 on a lattice of z, of length up to one lattice width."""
    line = torch.linspace(-EDGE, EDGE, 17, dtype=torch.float64) * 0.9
    z = torch.cartesian_prod(line, line)
    x = (z / float(schedule.alpha(sigma))).reshape(-1, *SHAPE)
    with torch.no_grad():
        score = ((denoiser(x, sigma) - x) / sigma**2).flatten(1)
    length = score.norm(dim=1, keepdim=True)
    arrows = score / length * length.clamp(max=float(length.median()) * 2) / float(length.median()) * 0.2
    axes.quiver(*z.T, *arrows.T, angles="xy", scale_units="xy", scale=1, width=0.004, color="tab:red")


def _figure(columns: int, rows: int) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need the package matplotlib; install it with pip install -e '.[plot]'") from error
    return Figure((2.6 * columns, 2.7 * rows), dpi=100, layout="constrained")


def _panel(figure: Any, rows: int, columns: int, place: int, title: str) -> Any:
    axes = figure.add_subplot(rows, columns, place, aspect="equal", xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE))
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
