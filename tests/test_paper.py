"""docs/paper.md names code that is there; its settings are settings, and its networks have the sizes that it says."""

from __future__ import annotations

import re

import pytest
import torch
from references import FORM, ROOT, wrong

from ldm.autoencoder.kl import AutoencoderKL
from ldm.config import AutoencoderTraining, DiffusionTraining, load
from ldm.diffusion.schedule import make_schedule
from ldm.unet.unet import UNet

PAPER = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
REFERENCES = sorted(set(FORM.findall(PAPER)))
ROWS = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in PAPER.splitlines() if line[:2] == "| "]
FIRST_STAGES = [row for row in ROWS if row[0].startswith("KL, ")]
NETWORKS = [row for row in ROWS if len(row) == 5 and "model.channels=" in row[2]]
SCHEDULES = [row for row in ROWS if row[1].startswith("`schedule.kind=")]


def words(cell: str) -> list[str]:
    return cell.strip("`").split()


@pytest.mark.parametrize("path", sorted({path for path, _ in REFERENCES}))
def test_what_is_named_is_there(path: str) -> None:
    assert wrong(path, REFERENCES) == []


def test_every_mention_of_a_file_has_the_one_form() -> None:
    """A path in another form would go unchecked; a command's name stands before its words."""
    mentioned = re.findall(r"`([^`\n]+\.py[^`\n]*)`", PAPER)
    commands = {word for word in mentioned if re.match(r"(scripts|tools)/\w+\.py( |$)", word)}
    assert all((ROOT / word.split()[0]).is_file() for word in commands)
    assert {word for word in mentioned if not FORM.fullmatch(f"`{word}`")} - commands == {"tests/test_paper.py"}
    assert len(REFERENCES) > 30


def test_the_tables_are_read() -> None:
    assert (len(FIRST_STAGES), len(NETWORKS), len(SCHEDULES)) == (5, 9, 4)


@pytest.mark.parametrize("row", FIRST_STAGES, ids=lambda row: row[0])
def test_first_stages(row: list[str]) -> None:
    config = load(AutoencoderTraining, None, words(row[2])).model
    factor, channels = map(int, re.findall(r"=(\d+)", row[0]))
    assert (config.factor, config.latent_channels) == (factor, channels)
    with torch.device("meta"):
        network = AutoencoderKL(config)
    assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}" == row[3]


@pytest.mark.parametrize("row", NETWORKS, ids=lambda row: row[0])
def test_networks(row: list[str]) -> None:
    """As many parameters as it says, and, where the paper counts the U-Net alone, within a fiftieth of the paper's."""
    with torch.device("meta"):
        network = UNet(load(DiffusionTraining, None, words(row[2])).model)
    count = sum(p.numel() for p in network.parameters()) / 1e6
    assert f"{count:.1f}" == row[4]
    paper = float(row[3].split()[0])
    assert count < paper if "with" in row[3] else count == pytest.approx(paper, rel=0.02)


@pytest.mark.parametrize("row", SCHEDULES, ids=lambda row: row[0])
def test_schedules(row: list[str]) -> None:
    config = load(DiffusionTraining, None, words(row[1])).schedule
    assert make_schedule(config).steps == 1000 and config.kind == "scaled_linear"
