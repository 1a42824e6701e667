"""When and how a run's state goes to disk and comes back; a disk that is full does not end the run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ldm.checkpoints.run_folder import saved_steps
from ldm.config import LoopConfig
from ldm.errors import UserError, first_line
from ldm.training.members import Members
from ldm.training.meters import Meters
from ldm.training.processes import from_all, from_main
from ldm.training.sharding import pack, unpack
from ldm.training.stage import Batches, Judge
from ldm.training.state import Keep, load_state, read_part, save_state, tidy, write_part


class Saver:
    """Everything that a run must remember, and where.

    Every process must call `save` and `restore`, and does so at the same steps; the main one writes.
    """

    def __init__(
        self,
        output: Path,
        loop: LoopConfig,
        accelerator: Accelerator,
        members: Members,
        batches: Batches,
        meters: Meters,
        judge: Judge | None,
        warn: Callable[[str], None],
    ) -> None:
        self.output, self.accelerator, self.members, self.batches = output, accelerator, members, batches
        self.meters, self.judge, self.warn = meters, judge, warn
        self.keep, self.global_batch = Keep(loop.keep, loop.keep_every), loop.global_batch
        self.skipped = self.in_a_row = 0  # steps whose loss or gradient was not finite
        self.images = 0  # that the run has seen; its global batch may have been another one at times

    def save(self, step: int, position: dict[str, Any] | None = None) -> str:
        """Write the state after `step`; empty, or why the disk did not take it.

        `position` is that of the batches after `step`, where a fetch that is under way may have moved them on.
        Raises UserError if weights are not finite: a NaN never reaches a checkpoint.
        """
        self.meters.share(self.accelerator)
        self.check_finite(step)
        why = self._write(step, position or self.batches.state_dict())
        if why and self.accelerator.is_main_process:
            last = (saved_steps(self.output) or ["none"])[-1]
            self.warn(f"warning: no state of step {step}: {why}; the last good one is of step {last}")
        return why

    def check_finite(self, step: int) -> None:
        """Raise UserError, on all processes, if weights or averages are not finite after `step`."""
        name = self.members.not_finite() if self.accelerator.is_main_process or self.members.sharded else ""
        if name := next((each for each in from_all(name, self.accelerator) if each), ""):
            raise UserError(
                f"weights of {name} are not finite after step {step}; lower optimizer.rate or use "
                f"loop.precision=fp32; the last good state is in {self.output / 'state'}"
            )

    def _write(self, step: int, position: dict[str, Any]) -> str:
        """Empty, or why the disk did not take it. Of sharded tensors each process writes its own share, then main."""
        accelerator = self.accelerator
        shares: dict[str, Any] = {}
        state = self._state(position) if accelerator.is_main_process or self.members.sharded else {}
        if self.members.sharded:
            state = {**pack(state, shares), "shares": accelerator.num_processes}
        if self.members.sharded and (why := self._tried(lambda: write_part(self.output, step, self._part(), shares))):
            return why
        if not accelerator.is_main_process:
            return self._tried(lambda: None)
        return self._tried(lambda: save_state(self.output, step, state, self.keep, self._needed()))

    def _tried(self, write: Callable[[], object]) -> str:
        """`write` here and whatever the other processes try; why the disk did not take one of them, or empty."""
        why = ""
        try:
            write()
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            why = str(error)
        return next((each for each in from_all(why, self.accelerator) if each), "")

    def _part(self) -> str:
        return f".{self.accelerator.process_index}of{self.accelerator.num_processes}"

    def restore(self, most: int | None = None) -> int:
        """Go on from the newest whole state, of step `most` or before; its step, 0 if there is none.

        Raises UserError if there are states and none can be read, or if they are of other networks or data.
        """
        step, state, wrong = -1, {}, ""
        if self.accelerator.is_main_process:
            try:
                if (found := load_state(self.output, most)) is not None:
                    step, state = found
                tidy(self.output, max(step, 0))
            except UserError as error:
                wrong = str(error)
        step, wrong = from_main((step, wrong), self.accelerator)  # the others may not choose another one
        if wrong:
            raise UserError(wrong)
        if step < 0:
            return 0
        try:
            self._load(step, state)
        except UserError as error:
            wrong = str(error)
        if wrong := next((each for each in from_all(wrong, self.accelerator) if each), ""):
            raise UserError(wrong)
        return step

    def _load(self, step: int, state: dict[str, Any]) -> None:
        """Take the state of `step`, which the main process has read already; raises UserError if it does not fit."""
        parts = []
        try:
            if not self.accelerator.is_main_process:
                state = read_part(self.output, step, check=True)
            count = state.get("shares", 0)
            parts = [read_part(self.output, step, f".{rank}of{count}") for rank in range(count)]
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"process {self.accelerator.process_index} cannot read the state of step {step} in "
                f"{self.output / 'state'} ({first_line(error)}); output must lie on storage that all nodes see"
            ) from error
        try:
            if parts:
                state = unpack(state, parts, self.members.mesh())
            self.members.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"the state in {self.output / 'state'} was saved by a run with other networks ({first_line(error)}); "
                f"go on with the settings in {self.output / 'config.json'}, or choose another output"
            ) from error
        self.batches.load_state_dict(state["batches"])
        self.meters.load_state_dict(state.get("meters", {}))
        self.skipped, self.in_a_row = state.get("bad", (0, 0))
        self.images = state.get("images", step * self.global_batch)  # states of before that was counted
        if self.judge is not None and state.get("guard"):
            self.judge.load_state_dict(state["guard"])

    def go_back(self, wrong: str) -> tuple[int, str]:
        """To the last state from before it went `wrong`, with a stricter judge: its step, and what changes, in words.

        The step is 0 if there is no such state. Raises UserError when the judge has had enough.
        """
        assert self.judge is not None
        stricter = self.judge.stricter(wrong)
        step: int = from_main(self._needed(), self.accelerator)
        if step:
            step = self.restore(most=step)
        changes = self.judge.go_on(stricter, back=bool(step))
        if step:
            self.save(step)  # so that a run that dies now does not forget it
        return step, changes

    def _needed(self) -> int:
        """The newest state that the judge would go back to; 0 if there is none."""
        if self.judge is None:
            return 0
        return max((step for step in saved_steps(self.output) if step <= self.judge.good), default=0)

    def _state(self, position: dict[str, Any]) -> dict[str, Any]:
        return {
            **self.members.state_dict(),
            "batches": position,
            "meters": self.meters.state_dict(),
            "images": self.images,
            "bad": (self.skipped, self.in_a_row),
            "guard": self.judge.state_dict() if self.judge is not None else None,
        }


def warn(text: str) -> None:
    with suppress(OSError):  # whoever looked on may have gone
        print(text, file=sys.stderr, flush=True)
