"""The formulas of docs/scaling.md, and that the page prints what the script computes."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "scaling.py"))
INPUTS = TOOL["Inputs"]()


def test_the_page_has_the_script_s_table():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert TOOL["table"](INPUTS) in page and TOOL["summary"](INPUTS) in page


def test_the_interval_is_the_one_that_loses_least():
    save, mean_time = 20.0, 30_000.0
    best = TOOL["best_interval"](save, mean_time)
    at = TOOL["lost"](save, best, mean_time, 600.0)
    assert all(TOOL["lost"](save, best * factor, mean_time, 600.0) > at for factor in (0.5, 0.9, 1.1, 2.0))


def test_limits():
    """One GPU exchanges nothing; in the limit of a perfect network all GPUs work all the time."""
    assert TOOL["allreduce_seconds"](INPUTS, 1) == 0
    fast = replace(INPUTS, interconnect=1e18, inside=1e18, latency=0.0)
    assert TOOL["row"](fast, 512).efficiency == pytest.approx(1)
    rows = [TOOL["row"](INPUTS, n) for n in (8, 64, 512)]
    assert [r.efficiency for r in rows] == sorted((r.efficiency for r in rows), reverse=True)
    assert TOOL["row"](replace(INPUTS, pictures=2e9), 64).days == pytest.approx(2 * rows[1].days)


def test_the_parameters_are_those_of_the_configuration():
    import torch

    from ldm.config import UNetConfig
    from ldm.unet.unet import UNet

    with torch.device("meta"):
        count = sum(p.numel() for p in UNet(UNetConfig()).parameters())
    assert count == pytest.approx(INPUTS.parameters, rel=1e-5)
