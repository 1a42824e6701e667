"""Quality against evaluations: a model by three samplers, with guidance, and students that were taught to need fewer.

All draw the same pictures: those of the prompts of prompt accuracy ("{phrase}, {style}"), in turn, from the seeds 0, 1,
... Of each cell two figures are told: the share of pictures whose nearest concept is the prompted one, and the kernel
distance from the real pictures of the same concepts and styles. A guided step counts as the two evaluations that it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from ldm.api import LatentDiffusion
from ldm.data.samples import decode_picture
from ldm.data.transforms import to_tensor
from ldm.errors import UserError
from ldm.files import atomic_write_bytes, atomic_write_text
from ldm.jobs import Settings
from ldm.judge.classifier import Classifier
from ldm.judge.pictures import Pictures
from ldm.judge.prompts import Judge, Score, make_prompts
from ldm.metrics.plots import new_figure, png
from ldm.metrics.sweep import Cell, as_csv
from studies.subject import SPACE, Subject

SAMPLERS = ("ddim", "dpmpp_2m", "unipc")  # of the model itself
BUDGETS = (4, 8, 16, 30, 60)  # evaluations of a guided picture of it, half as many steps
STEPS = (1, 2, 4, 8)  # of a student
FIGURE = f"KD[{SPACE}]"


@dataclass(frozen=True)
class Student:
    """A model that was taught to need few steps."""

    name: str
    path: str  # of a model, or of a LoRA of the model itself
    sampler: str = ""  # that draws it, at cfg 1 on the trailing grid; empty: it is drawn as it says of itself

    @classmethod
    def read(cls, word: str) -> Student:
        """NAME=PATH or NAME=PATH,SAMPLER. Raises UserError for other words."""
        name, _, rest = word.partition("=")
        path, _, own = rest.partition(",")
        if not name or not path:
            raise UserError(f"a student is said as NAME=PATH or NAME=PATH,SAMPLER, and not as '{word}'")
        return cls(name, path, own)


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of every way to draw: prompts, the concept that each names, and who judges."""

    concepts: Mapping[str, str]  # prompt -> concept
    judge: Judge

    @classmethod
    def of(
        cls, pictures: Pictures, classifier: Classifier, names: Sequence[str], styles: Sequence[str], most: int
    ) -> Self:
        """`most` prompts, evenly taken where there are more, so that each style has its share."""
        prompts = make_prompts(pictures, names, styles)
        number = min(most, len(prompts))
        taken = [prompts[i * len(prompts) // number] for i in range(number)]
        return cls({prompt.text: prompt.concept for prompt in taken}, Judge(classifier, pictures, names))

    def score(self, paths: Sequence[Path]) -> dict[str, float]:
        """Of pictures drawn in the order of the prompts, in turn: how many are nearest to their own concept."""
        images = torch.stack([to_tensor(decode_picture(path.read_bytes())) for path in paths])
        asked = list(self.concepts.values())
        found = Score.of(self.judge.ranks(images, [asked[i % len(asked)] for i in range(len(paths))])).figures()
        return {"accuracy": found["top1"], "low": found["low"], "high": found["high"]}


def run(
    subject: Subject,
    students: Mapping[Student, LatentDiffusion],
    question: Question,
    cfg: float,
    quick: bool,
    count: int,
) -> None:
    """Print the table; write it with its curves and a grid of pictures."""
    subject = replace(subject, captions=tuple(question.concepts))

    def cells(
        name: str, samplers: Sequence[str], scale: float, steps: Sequence[int], spacing: str | None
    ) -> list[Cell]:
        return [
            subject.cell({"model": name, "sampler": way, "steps": n}, Settings(scale, n, way, spacing), count)
            for way in samplers
            for n in (steps[:1] if quick else steps)
        ]

    groups = [(subject.model, cells("base", SAMPLERS, cfg, [n // 2 for n in BUDGETS], "trailing"))]
    for student, model in students.items():
        meant = model.config.drawing
        way, scale, spacing = meant.sampler, meant.cfg, meant.spacing or None
        if student.sampler:
            way, scale, spacing = student.sampler, 1.0, "trailing"
        groups.append((model, cells(student.name, [way], scale, STEPS, spacing)))
    rows = []
    for model, own in groups:
        for cell, row in zip(own, replace(subject, model=model).measure(own), strict=subject.crew.main):
            paths = sorted((subject.folder / cell.name).rglob("*.png"))[:count]
            rows.append(row | question.score(paths))
    if not subject.crew.main:
        return
    atomic_write_text(subject.folder / "sweep.csv", as_csv(rows))
    atomic_write_bytes(subject.folder / "fewer-steps.png", curves(rows))
    shown = [cell for _, own in groups for cell in own if cell.varied["sampler"] in ("ddim", "lcm")]
    subject.save_grid(shown, "fewer-steps-grid.png")
    print(
        f"{count} pictures in each row, base at cfg {cfg:g}; {FIGURE} x 1000 from "
        f"{len(subject.against.real)} real ones\n\n{table(rows)}\n\n"
        f"wrote sweep.csv, fewer-steps.png and fewer-steps-grid.png into {subject.folder}; the grid's rows:\n"
        + "\n".join(cell.name for cell in shown)
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, a line for each way to draw."""
    lines = [["model", "sampler", "steps", "evaluations", "accuracy", "95 % interval", "KD x 1000"], ["---"] * 7]
    for row in rows:
        interval = f"{row['low']:.1%} - {row['high']:.1%}"
        distance = f"{1000 * row[FIGURE]:.1f} +- {1000 * row[f'{FIGURE} deviation']:.1f}"
        said = [row["model"], row["sampler"], str(row["steps"]), f"{row['evaluations']:g}", f"{row['accuracy']:.1%}"]
        lines.append([*said, interval, distance])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def curves(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: accuracy, and the kernel distance, against evaluations, a line for each model and sampler."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(f"{row['model']}, {row['sampler']}", []).append(row)
    figure = new_figure(11, 4.5)
    for place, (y, title) in enumerate([("accuracy", "prompt accuracy"), (FIGURE, FIGURE)]):
        panel = figure.add_subplot(1, 2, place + 1, xlabel="evaluations of the network for a picture", ylabel=title)
        for number, (label, those) in enumerate(lines.items()):
            points = sorted(those, key=lambda row: row["evaluations"])
            style = "osv^D"[number % 5] + ("--" if label.startswith("base,") else "-")
            panel.plot([row["evaluations"] for row in points], [row[y] for row in points], style, label=label, ms=4)
        panel.set_xscale("log", base=2)
        ticks = [2**k for k in range(7)]
        panel.set_xticks(ticks, labels=map(str, ticks))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return png(figure)
