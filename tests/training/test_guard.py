"""A discriminator that spoils the reconstruction: back to the last good state, with less weight, and it is said."""

from dataclasses import replace

import pytest
import torch

from ldm.config import LoopConfig
from ldm.errors import UserError
from ldm.training import state
from ldm.training.guard import Guard
from ldm.training.stage_one import AutoencoderStage
from ldm.training.state import load_state, saved_steps

from .toys import AUTOENCODER, CPU, LOOP, ToyStage, log_of, run

SHORT = replace(LOOP, steps=12, log_every=1, save_every=2)


class Spoiled(ToyStage):
    """From the guard's start on, the network's output is worse by what the adversarial weight makes of it."""

    def __init__(self, loop: LoopConfig, limit: float, start: int, harm: float) -> None:
        super().__init__(loop)
        self.guard = self.judge = Guard(limit, start)
        self.harm, self.steps = harm, []

    def losses(self, batch, draws, step, networks):
        self.steps.append(step)
        adversarial = self.guard.weight * self.harm if step >= self.guard.start else 0.0
        for name, loss, logs in super().losses(batch, draws, step, networks):
            yield name, loss, {**logs, "l1": torch.tensor(1.0 + adversarial)}


def test_the_judgement():
    guard = Guard(1.5, 10)
    assert [guard(step, {"l1": value}) for step, value in ((5, 4.0), (8, 2.0), (10, 3.5))] == ["", "", ""]
    assert guard.best == 2.0 and guard.good == 8
    assert guard(11, {"l1": 2.4}) == "" and guard.good == 11
    assert guard(12, {"l1": 2.9}) == "" and guard.good == 11  # suspicious: allowed, but no state to go back to
    assert guard(13, {"l1": 3.2}) == "the reconstruction was 1.60 times its best at step 13"
    assert guard(14, {}) == ""


def test_the_run_goes_back_with_half_the_weight_as_often_as_it_takes_and_says_so(tmp_path):
    stage = Spoiled(SHORT, limit=1.5, start=5, harm=1.6)  # 2.6, 1.8, 1.4 times the best
    run(stage, SHORT, tmp_path)
    assert stage.steps == [*range(6), 5, *range(5, 12)]
    assert (stage.guard.weight, stage.guard.times) == (0.25, 2)
    events = [line for line in log_of(tmp_path) if "event" in line]
    assert [line["step"] for line in events] == [5, 5]  # a state is saved where the discriminator starts
    assert "2.60 times its best at step 6: back to step 5, and the adversarial weight is 0.5 of" in events[0]["event"]
    steps = [line["step"] for line in log_of(tmp_path) if "l1" in line]
    assert steps == list(range(1, 13))
    found = load_state(tmp_path)
    assert found is not None and found[1]["guard"]["weight"] == 0.25


def test_what_was_learnt_of_a_going_back_survives_a_kill(tmp_path):
    """The state it went back to is written anew, so that whoever goes on from it has the lower weight."""

    class Killed(Spoiled):
        def losses(self, batch, draws, step, networks):
            if self.guard.times == 1:
                raise MemoryError  # any sudden end
            yield from super().losses(batch, draws, step, networks)

    with pytest.raises(MemoryError):
        run(Killed(SHORT, 1.5, 5, 0.9), SHORT, tmp_path)
    again = Spoiled(SHORT, 1.5, 5, 0.9)
    run(again, SHORT, tmp_path)
    assert again.steps[0] == 5 and (again.guard.weight, again.guard.times) == (0.5, 1)


@pytest.mark.parametrize("where", ["file", "hash"])
def test_a_kill_in_the_middle_of_going_back_leaves_a_state(tmp_path, monkeypatch, where):
    """Later states are set aside and the one it went back to is being written anew: before its file is there, and
    between its file and its hash."""
    name = "write_part" if where == "file" else "atomic_write_text"
    write = getattr(state, name)
    stage = Spoiled(SHORT, 1.5, 5, 0.9)

    def killed(*arguments):
        if stage.guard.times == 1:
            raise MemoryError  # any sudden end
        return write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(state, name, killed)
        run(stage, SHORT, tmp_path)
    again = Spoiled(SHORT, 1.5, 5, 0.9)
    run(again, SHORT, tmp_path)
    assert again.steps[0] == 5 and again.guard.weight == 0.5
    assert not list((tmp_path / "state").glob("*.unused"))


def test_the_state_it_needs_is_kept_when_others_go(tmp_path):
    """Slowly worse: allowed for some time, but the states of that time are not good."""

    class Slow(Spoiled):
        def losses(self, batch, draws, step, networks):
            self.harm = 0.3 if step < 10 else 3.0
            yield from super().losses(batch, draws, step, networks)

    loop = replace(SHORT, save_every=1)
    stage = Slow(loop, 1.5, 5, 0.0)
    run(stage, loop, tmp_path)
    # With the whole weight steps 5 to 9 are 1.3 times the best, which is allowed but no place to go back to; with half
    # of it they are 1.15 times the best.
    assert stage.steps == [*range(11), *range(5, 11), 10, 10, 11]
    assert saved_steps(tmp_path) == [10, 11, 12] and stage.guard.good == 10


def test_a_reconstruction_that_cannot_be_saved_ends_the_run_in_a_sentence(tmp_path):
    class Hopeless(Spoiled):
        def losses(self, batch, draws, step, networks):
            for name, loss, logs in super().losses(batch, draws, step, networks):
                yield name, loss, {**logs, "l1": torch.tensor(1.0 if step < 5 else 9.0)}

    with pytest.raises(
        UserError, match=r"was 9.00 times its best .* once more.* weight is 0.03125 of what was asked; lower loss.adv"
    ):
        run(Hopeless(SHORT, 1.5, 5, 0.0), SHORT, tmp_path)


def test_without_a_state_to_go_back_to_each_line_of_the_log_does_not_cost_a_try(tmp_path):
    class Steep(Spoiled):
        def losses(self, batch, draws, step, networks):
            for name, loss, logs in super().losses(batch, draws, step, networks):
                yield name, loss, {**logs, "l1": torch.tensor(1.0 if step < 2 else 9.0)}

    loop = replace(SHORT, save_every=100)
    stage = Steep(loop, 1.5, 0, 0.0)
    run(stage, loop, tmp_path)
    assert stage.guard.times == 1
    (event,) = [line["event"] for line in log_of(tmp_path) if "event" in line]
    assert "no state from before it was kept" in event


def test_the_stage_s_adversarial_weight_follows_the_guard():
    from .test_stage_one import first_losses

    weights = []
    for weight in (1.0, 0.25):
        stage, losses = first_losses(AUTOENCODER, 2)
        assert stage.judge is not None and stage.judge.start == 2
        stage.judge.weight = weight
        weights.append(float(next(losses)[2]["adversarial_weight"]))
    assert weights[1] == pytest.approx(weights[0] / 4)
    with pytest.raises(UserError, match=r"loss\.guard is a factor above 1"):
        AutoencoderStage(replace(AUTOENCODER, loss=replace(AUTOENCODER.loss, guard=0.9)), 0, 1, CPU)


@pytest.mark.slow
def test_a_real_discriminator_that_takes_over(tmp_path):
    """Its weight far too large, without the adaptive one's clamp: the reconstruction recovers."""
    loop = replace(LOOP, steps=60, log_every=5, save_every=5)
    loss = replace(AUTOENCODER.loss, adversarial=10.0, adversarial_start=30, discriminator_rate=1e-2)
    config = replace(AUTOENCODER, loop=loop, loss=loss)
    run(AutoencoderStage(config, 0, 1, CPU), loop, tmp_path, config)
    l1 = [line["l1"] for line in log_of(tmp_path) if "l1" in line]
    assert any("event" in line for line in log_of(tmp_path))
    assert l1[-1] < 1.5 * min(l1)
