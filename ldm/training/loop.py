"""The loop that all trainings share: micro-batches, accumulation, optimizer steps, EMA, logs, states.

A *stage* (stage_one.py, clip.py, stage_two.py) says what is trained and what its loss is; the loop knows no network.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm import settings
from ldm.config import LoopConfig
from ldm.errors import UserError, kind_and_line, out_of_memory
from ldm.files import atomic_write_text
from ldm.locks import check_free
from ldm.plain import leaves
from ldm.training.backward import Gradients, accumulate
from ldm.training.command import BEGAN
from ldm.training.draws import generator
from ldm.training.fetching import Fetcher
from ldm.training.members import Members
from ldm.training.meters import Meters
from ldm.training.preflight import check_output
from ldm.training.processes import (
    Division,
    agree,
    check_order,
    divide,
    from_all,
    make_accelerator,
    open_trackers,
    precision_here,
    writing_alone,
)
from ldm.training.report import Report
from ldm.training.saving import Saver, warn
from ldm.training.stage import Stage
from ldm.training.stopping import noted_signals

DONE, BACK, LATE = -1, -2, -3  # how `_Run._until` ends, beside the number of a signal; LATE: the time is up
POLL = 0.5  # seconds between looks at the clock and at signals, where a batch is waited for
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")  # of gloo and NCCL


def carry_out(config: Any, stage: Callable[..., Stage]) -> None:
    """Train the stage that `stage` makes of settings, process number, processes and device. Raises as `train` does."""
    output = prepare_output(config.output, config.resume)
    accelerator = make_accelerator(config.loop, output)
    made = stage(config, accelerator.process_index, accelerator.num_processes, accelerator.device)
    train(made, config.loop, accelerator, output, config)


def prepare_output(output: str, resume: str) -> Path:
    """The run's folder; raises UserError if none is named, or if it holds a run that is under way or not to go on."""
    if not output:
        raise UserError("no output folder; say output=runs/NAME")
    if resume not in ("", "auto"):
        raise UserError(f"unknown resume '{resume}'; use --resume auto, or leave it out to start anew")
    path = Path(output)
    check_output(path)
    check_free(path)
    if not resume and (path / "state").exists():
        raise UserError(f"{path} holds a run already; add --resume auto to go on with it, or choose another output")
    return path


def train(stage: Stage, loop: LoopConfig, accelerator: Accelerator, output: Path, everything: Any) -> None:
    """Run `stage` until `loop.steps` optimizer steps are done, time is up, or a signal asks to stop.

    `everything` is the run's whole configuration; it is kept as `output/config.json`. Going on from a saved state
    happens whenever `output` has one. Raises UserError when losses or gradients stay non-finite, or another process
    has gone, or writes into `output`; raises KeyboardInterrupt after saving on SIGINT.
    """
    try:
        with writing_alone(output, accelerator):
            _Run(stage, loop, accelerator, output, everything).go_on()
    except RuntimeError as error:
        if out_of_memory(error):
            raise UserError(
                f"the memory of {accelerator.device} does not suffice for a micro-batch of "
                f"{divide(loop, accelerator.num_processes).micro}; lower loop.micro_batch, which changes no result"
            ) from error
        if accelerator.num_processes == 1 or not any(sign in str(error) for sign in LOST):
            raise
        raise UserError(
            f"process {accelerator.process_index} has lost the connection to another process of the "
            "run, whose own output says why; --resume auto goes on from the last state"
        ) from error


class _Run:
    """One call of `train`: what its parts share."""

    def __init__(self, stage: Stage, loop: LoopConfig, accelerator: Accelerator, output: Path, everything: Any) -> None:
        self.stage, self.loop, self.accelerator, self.output = stage, loop, accelerator, output
        self.division = divide(loop, accelerator.num_processes)
        self.main = accelerator.is_main_process
        self.members = Members(stage.players, loop, accelerator)
        self.meters = Meters()
        batches = stage.batches
        self.saver = Saver(output, loop, accelerator, self.members, batches, self.meters, stage.judge, warn)
        self.step = self.saver.restore()
        check_order(batches, accelerator)
        self.lost: set[str] = set()  # shards in quarantine of which the log knows
        if loop.trackers:
            open_trackers(accelerator, loop, _flat(everything))
        if self.main:
            atomic_write_text(output / "config.json", json.dumps(settings.to_dict(everything), indent=1) + "\n")
            _print_plan(stage, loop, self.division, accelerator, self.step)
        self.report = Report(output, self.step, loop.steps) if self.main else None
        if self.report is not None and not self.step:
            for event in batches.events:
                self.report.line(0, {"event": event})

    def go_on(self) -> None:
        with noted_signals() as asked:
            how = self._until(asked)
            while how == BACK:
                how = self._until(asked)
        if how == DONE:
            self._finish()
        else:
            why = ": the time is up" if how == LATE else " as asked"
            self._say(f"stopped at step {self.step}{why}; --resume auto goes on from there")
        if self.report is not None:
            self.report.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if how == signal.SIGINT:
            raise KeyboardInterrupt

    def _until(self, asked: list[int]) -> int:
        """Steps until DONE, until a signal is to be heeded (its number), until LATE, or BACK at an earlier step."""
        loop, end = self.loop, 0
        interval, counted, waiting = time.monotonic(), 0, 0.0
        self.unsaved = ""
        with closing(Fetcher(self.stage.batches)) as fetcher:
            while self.step < loop.steps and not end:
                before = time.monotonic()
                position = self.stage.batches.state_dict()
                batch, end = self._next(fetcher, asked)
                waiting += time.monotonic() - before
                if end:  # while it waited: the state is that after the last step
                    self.unsaved = self.saver.save(self.step, position)
                    break
                end = self._step(batch, asked)
                counted += 1
                step = self.step
                if step % loop.log_every == 0 or step in (1, loop.steps):  # the first at once: it runs, and so fast
                    spent = time.monotonic() - interval
                    if self._log_means(counted * loop.global_batch / spent, waiting / spent):
                        return BACK
                    counted, waiting, interval = 0, 0.0, time.monotonic()
                validate = step % loop.validate_every == 0
                draw = bool(loop.sample_every) and step % loop.sample_every == 0
                if validate or draw:
                    before = time.monotonic()
                    self._look(validate, draw)
                    interval += time.monotonic() - before  # which is no part of the interval
                if self.members.profiles and (step % loop.ema_snapshot_every == 0 or step == loop.steps):
                    self._snapshot()
                judged = self.stage.judge is not None and step == self.stage.judge.start
                if end or step == loop.steps or step % loop.save_every == 0 or judged:
                    self.unsaved = self.saver.save(step)
        if self.unsaved and end:
            raise UserError(f"the run ends at step {self.step} and its state is not saved: {self.unsaved}")
        return end or DONE

    def _next(self, fetcher: Fetcher, asked: list[int]) -> tuple[Any, int]:
        """A batch, or how to end: a store that hangs does not keep a run from saving in time.

        All processes get theirs, or none does: who went ahead would wait in the middle of a step, where nothing
        reaches it. Raises UserError if any process cannot have one.
        """
        fetcher.ask()
        while True:
            late = not fetcher.wait(POLL)
            failed = not late and fetcher.failed()
            signs = [late, failed, asked[0] if asked else 0, self._over()]
            any_late, any_failed, signalled, over = agree([int(sign) for sign in signs], self.accelerator)
            if failed:
                fetcher.take()
            if any_failed:
                raise UserError("another process of the run could not read its data; its own output says why")
            if not any_late:
                return fetcher.take(), 0
            if signalled or over:
                return None, signalled or LATE

    def _over(self) -> bool:
        """The queue that ends a job counts from its start, so imports and the opening of shards are counted too."""
        return bool(self.loop.max_minutes) and time.monotonic() - BEGAN > 60 * self.loop.max_minutes

    def _step(self, batch: Any, asked: list[int]) -> int:
        """One optimizer step, or none if something is not finite; the signal that asks to stop, LATE, or 0."""
        loop, accelerator, members = self.loop, self.accelerator, self.members
        # For dropout, whose masks are for the rows as they come: no two steps, seeds or processes have the same.
        address = ("dropout", loop.seed, self.step, accelerator.process_index)
        torch.manual_seed(generator(*address).initial_seed())
        made = accumulate(self.stage, batch, self.division, members.networks, accelerator, loop.seed, self.step)
        norms = members.clip(made.played)
        signs = [bool(made.bad), asked[0] if asked else 0, self._over()]
        bad_loss, signalled, over = agree([int(sign) for sign in signs], accelerator)
        bad_norm = next((name for name, norm in norms.items() if not math.isfinite(norm)), "")
        if not bad_loss and not bad_norm:
            members.update(made.played, self.step)
            self.saver.in_a_row = 0
        members.forget(made.played)
        self.step += 1
        self.saver.images += loop.global_batch
        if bad_loss or bad_norm:
            self._skipped(made, bad_norm)
        else:
            for key, value in {**made.logs, **{f"gradient/{name}": norm for name, norm in norms.items()}}.items():
                self.meters.add(key, value)
            if made.each_sigma:
                self.meters.add_levels(made.each_loss, made.each_sigma)
        if self.report is not None:
            self.report.advance()
        return signalled or (LATE if over else 0)

    def _snapshot(self) -> None:
        """The power-function averages as they are now. A NaN must not reach them either."""
        self.saver.check_finite(self.step)
        if self.main:
            self._if_it_can("snapshot of the averages", lambda: self.members.snapshot(self.output, self.step))

    def _skipped(self, made: Gradients, bad_norm: str) -> None:
        """Count a step that was not taken, and say what it was made of; raises UserError when there are too many."""
        saver, scaled = self.saver, self.members.scaler is not None
        saver.skipped, saver.in_a_row = saver.skipped + 1, saver.in_a_row + 1
        found = from_all((made.bad, made.suspects()), self.accelerator)
        bad = next((name for name, _ in found if name), "")
        what = f"the loss of {bad}" if bad else f"the gradient of {bad_norm}"
        samples = [sample for name, names in found if name or not bad for sample in names]
        # The scaler finds its scale by overflowing, and begins at 2 ** 16.
        if saver.in_a_row == self.loop.bad_steps * (2 if scaled else 1):
            raise UserError(
                f"{what} was not finite, {saver.in_a_row} steps in a row up to step {self.step - 1} (samples "
                f"{'; '.join(samples[:4])}, ...); lower optimizer.rate or use loop.precision=fp32; "
                f"the last good state is in {self.output / 'state'}"
            )
        if self.report is not None and (bad or not scaled):
            self.report.line(self.step, {"event": f"step skipped: {what} is not finite", "samples": samples})

    def _log_means(self, images_per_s: float, waiting: float) -> bool:
        """A line of the log; True if the stage's judge makes the run go back, which it then has done."""
        means = self.meters.take(self.accelerator)
        wrong = self.stage.judge(self.step, means) if self.stage.judge is not None else ""
        values = dict(means)
        values["rate"] = self.members.rate(next(iter(self.members.players)), self.step - 1)
        values["images"] = self.saver.images
        values["images_per_s"] = images_per_s
        values["waiting"] = waiting
        if self.accelerator.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self.saver.skipped:
            values["skipped"] = self.saver.skipped
        if lost := self._lost_shards():
            values["quarantined"] = lost
        self._log(values)
        if wrong:
            self._go_back(wrong)
        return bool(wrong)

    def _lost_shards(self) -> int:
        """How many shards were not available to some process; those that are new get a line of the log."""
        found = set().union(*from_all(self.stage.batches.quarantined, self.accelerator))
        if self.report is not None:
            for shard in sorted(found - self.lost):
                self.report.line(self.step, {"event": f"shard in quarantine: {shard}"})
        self.lost |= found
        return len(self.lost)

    def _go_back(self, wrong: str) -> None:
        step, changes = self.saver.go_back(wrong)
        self.step = step or self.step
        where = f"back to step {step}" if step else "no state from before it was kept"
        if self.report is not None:
            self.report.back_to(self.step)
            self.report.line(self.step, {"event": f"{wrong}: {where}, and {changes}"})

    def _look(self, validate: bool, draw: bool) -> None:
        """Held-out figures and pictures from the averaged weights, by the main process alone."""
        if self.main or self.members.sharded:
            with self.members.averaged(), torch.no_grad():
                if self.main and validate:
                    self._if_it_can("figures", lambda: self._log(self.stage.validate()))
                if self.main and draw:
                    self._if_it_can("pictures", lambda: self.stage.draw(self.output, self.step))
        self.accelerator.wait_for_everyone()

    def _finish(self) -> None:
        if self.main or self.members.sharded:
            with self.members.averaged(), torch.no_grad():
                if self.main:
                    self.stage.export(self.output, finished=True)
        self._look(validate=self.step % self.loop.validate_every != 0, draw=True)
        if self.unsaved:
            raise UserError(f"the run ends at step {self.step} and its state is not saved: {self.unsaved}")
        self._say(f"finished at step {self.step} after {(time.monotonic() - BEGAN) / 60:.1f} minutes: {self.output}")

    def _log(self, values: Mapping[str, float]) -> None:
        if self.report is not None and values:
            self.report.line(self.step, values)
        if self.loop.trackers:
            self.accelerator.log(dict(values), step=self.step)

    def _say(self, text: str) -> None:
        if self.report is not None:
            self.report.say(text)

    def _if_it_can(self, what: str, make: Callable[[], None]) -> None:
        """Make what is not worth a run. A full disk, a store that is gone, memory: whatever fails is told, no more."""
        try:
            make()
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else kind_and_line(error)
            warn(f"warning: no {what} of step {self.step}, and the run goes on: {why}")


def _print_plan(stage: Stage, loop: LoopConfig, division: Division, accelerator: Accelerator, step: int) -> None:
    sizes = {name: sum(p.numel() for p in player.module.parameters()) for name, player in stage.players.items()}
    lines = [
        f"data        {stage.batches.describe()}",
        *stage.describe(),
        f"batch       {loop.global_batch} = {division.processes} processes x {division.accumulation} accumulation x "
        f"{division.micro} micro-batch",
        f"steps       {step} to {loop.steps}" + (f", at most {loop.max_minutes:g} minutes" if loop.max_minutes else ""),
        "parameters  " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        f"precision   {precision_here(loop.precision)} on {accelerator.device}, {torch.get_num_threads()} threads",
    ]
    if accelerator.device.type == "cuda" and division.processes == 1 < torch.cuda.device_count():
        lines.append(f"devices     1 of {torch.cuda.device_count()}; accelerate-launch --multi_gpu starts a run on all")
    print("\n".join(lines), flush=True)


def _flat(config: Any) -> dict[str, bool | int | float | str]:
    """{"a.b": 1, "c": "[2]"}: what trackers take for a run's settings."""
    plain = leaves(settings.to_dict(config))
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in plain}
