"""What is not finite is skipped, counted and named, and reaches no checkpoint."""

import json
import math
from dataclasses import replace

import pytest
import torch

from ldm.errors import UserError
from ldm.training.meters import EACH_LOSS, EACH_SIGMA
from ldm.training.stage_one import AutoencoderStage
from ldm.training.stage_two import diffusion_stage
from ldm.training.state import load_state

from .test_combinations import PLAIN
from .toys import AUTOENCODER, CPU, LOOP, ToyStage, log_of, run


def events(output) -> list[dict]:
    return [line for line in log_of(output) if "event" in line]


class Sick(ToyStage):
    """Row 21's picture is broken, and the stage says what each sample's loss and level are."""

    def losses(self, batch, draws, step, networks):
        for name, loss, logs in super().losses(batch, draws, step, networks):
            each = torch.tensor([math.nan if key == "row21" else 1.0 for key in batch.key])
            yield name, loss + each.mean(), {**logs, EACH_LOSS: each, EACH_SIGMA: torch.arange(len(each)) / 10}


def test_the_samples_of_a_skipped_step_are_named_with_their_levels(tmp_path):
    loop = replace(LOOP, micro_batch=4)
    run(Sick(loop), loop, tmp_path)
    (event,) = events(tmp_path)
    assert event == {
        "step": 3,
        "event": "step skipped: the loss of net is not finite",
        "samples": ["row21, sigma 0.1, loss nan"],
    }
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path) if "loss" in line)
    assert [line["skipped"] for line in log_of(tmp_path) if "skipped" in line] == [1, 1]


def test_a_loss_that_is_not_finite_though_its_gradient_is(tmp_path):
    class Infinite(ToyStage):
        def losses(self, batch, draws, step, networks):
            for name, loss, logs in super().losses(batch, draws, step, networks):
                yield name, loss + (math.inf if step == 1 else 0.0), logs

    run(Infinite(), LOOP, tmp_path)
    assert [event["step"] for event in events(tmp_path)] == [2]


def test_a_gradient_that_is_not_finite_though_its_loss_is(tmp_path):
    class Steep(ToyStage):
        def losses(self, batch, draws, step, networks):
            weight = networks["net"][0].weight
            for name, loss, logs in super().losses(batch, draws, step, networks):
                yield name, loss + (0 * weight.sum()).sqrt() if step == 1 else loss, logs  # the root's slope at 0

    run(Steep(), LOOP, tmp_path)
    assert [event["event"] for event in events(tmp_path)] == ["step skipped: the gradient of net is not finite"]


def test_how_many_in_a_row_is_a_setting_and_survives_an_interruption(tmp_path):
    loop = replace(LOOP, steps=100, bad_steps=4, save_every=1)
    sick = ToyStage(loop, lambda step: math.nan if step >= 2 else None)
    run(sick, replace(loop, steps=5), tmp_path)
    with pytest.raises(UserError, match="4 steps in a row up to step 5 "):
        run(sick, loop, tmp_path)
    run(ToyStage(loop), replace(loop, steps=9), tmp_path)
    found = load_state(tmp_path)
    assert found is not None and found[1]["bad"] == (3, 0)


@pytest.mark.parametrize("mended", [False, True])
def test_a_nan_never_reaches_a_checkpoint(tmp_path, mended):
    """A weight that is infinite, as an optimizer step may leave it, and still when only its average is."""

    def spoil(step: int) -> None:
        if step == 4:
            stage.network[0].weight.data[0, 0] = math.inf
        if step == 5 and mended:
            stage.network[0].weight.data[0, 0] = 0.0

    stage = ToyStage(LOOP, spoil)
    with pytest.raises(UserError, match=r"weights of net are not finite after step 6; lower optimizer\.rate"):
        run(stage, LOOP, tmp_path)
    found = load_state(tmp_path)
    assert found is not None and found[0] == 3


@pytest.mark.parametrize("number", [1, 2])
def test_a_real_stage_says_which_sample_and_which_level(tmp_path, number):
    loop = replace(LOOP, steps=3, validate_every=99)
    config = replace((AUTOENCODER, PLAIN)[number - 1], loop=loop)
    stage = AutoencoderStage(config, 0, 1, CPU) if number == 1 else diffusion_stage(config, 0, 1, CPU)
    broken: list[str] = []

    class Broken(stage.batches.__class__):
        def __iter__(self):
            for index, batch in enumerate(super().__iter__()):
                if index == 1:
                    batch.image[5] = math.nan
                    broken.append(batch.key[5])
                yield batch

    stage.batches.__class__ = Broken
    run(stage, loop, tmp_path, config)
    (event,) = events(tmp_path)
    (said,) = event["samples"]
    assert event["step"] == 2 and said.startswith(broken[0] + ", ") and said.endswith("loss nan")
    assert ("sigma" in said) == (number == 2)


def test_the_log_has_the_loss_by_noise_level(tmp_path):
    config = replace(PLAIN, loop=replace(LOOP, steps=8, log_every=8))
    run(diffusion_stage(config, 0, 1, CPU), config.loop, tmp_path, config)
    _, line = [line for line in log_of(tmp_path) if "loss" in line]
    bins = {key: value for key, value in line.items() if key.startswith("levels/")}
    assert set(bins) <= {f"levels/{b}" for b in ("0-0.1", "0.1-0.3", "0.3-1", "1-3", "3-10", "10-")} and len(bins) >= 4
    assert min(bins.values()) <= line["loss"] <= max(bins.values())
    assert json.dumps(bins)
