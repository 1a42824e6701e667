"""Pools of processes that end when the work does, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import BaseContext

from ldm.errors import UserError


@contextmanager
def pool(processes: int, context: BaseContext | None = None) -> Iterator[ProcessPoolExecutor]:
    """So many processes; when the block is interrupted they end at once, and when this process is killed too.

    Raises UserError if one of them dies.
    """
    with ProcessPoolExecutor(processes, context, initializer=_begin) as executor:
        try:
            yield executor
        except BrokenProcessPool as error:
            raise UserError("a worker process died, perhaps because memory ran out; use fewer of them") from error
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to heed
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_outlive_nobody, daemon=True).start()


def _outlive_nobody() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
