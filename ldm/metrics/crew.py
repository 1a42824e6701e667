"""Who measures: the processes that an evaluation is divided among, by accelerate.

Work is cut into numbered pieces whose results are files; process r of n does the pieces r, r + n, ... that are not
there yet. So nothing depends on how many processes there are, and what was stopped goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch


@dataclass(frozen=True)
class Crew:
    """This process among those that were launched; alone by default."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def mine(self, pieces: int) -> Iterator[int]:
        """The numbers of this process' pieces."""
        return iter(range(self.rank, pieces, self.world))

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def muster() -> Crew:
    """The processes of `accelerate-launch`, connected; one that was started by itself is alone, at no cost.

    On a CPU the cores are divided among them.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Crew()
    from accelerate import PartialState

    # Long: the others wait while the first one computes figures.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    if not torch.accelerator.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    return Crew(state.process_index, state.num_processes)
