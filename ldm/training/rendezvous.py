"""How the processes of a run find each other, at its start and after each restart of theirs.

torchrun keeps one store of keys over all its restarts, and the process group writes its addresses under the same keys
each time. So a restarted process may read where a dead one was to be found, and waits for it until the timeout. Here
the living first agree on a word that none of the dead knew, and their keys begin with it. (torchrun's count of
restarts is no such word: each node counts its own.)
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from uuid import uuid4

import torch
from torch import distributed
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

# For one process to wait for another. Validation, pictures, the export and a slow store are work of one process alone,
# during which NCCL's own limit of 10 minutes would end the run. A process that dies is noticed at once, by its launcher
# and by the connection; the limit is for machines that vanish.
PATIENCE = timedelta(hours=4)


def join() -> None:
    """Make the process group, if torchrun or accelerate's launcher started this process and it has none yet."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or distributed.is_initialized():
        return
    store, rank, world = next(rendezvous("env://"))
    store = PrefixStore(agree_on_word(store, rank, world), store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)


def agree_on_word(store: Store, rank: int, world: int) -> str:
    """A word that is the same for all `world` ranks calling now, and new; `store` may hold anything of former calls.

    Rank 0 says it. The others ask under names never used before, so that no old answer can be theirs, and rank 0
    answers whoever is said to ask, dead or alive, until each rank has repeated its word.
    """
    mine = uuid4().hex
    if rank:
        store.set(f"asking/{rank}", mine)
        word = store.get(f"answer/{mine}").decode()  # waits for it
        store.set(f"heard/{rank}/{word}", "")
        return word
    silent = set(range(1, world))
    while silent:
        for other in silent:
            store.set(f"answer/{store.get(f'asking/{other}').decode()}", mine)
        silent = {other for other in silent if not store.check([f"heard/{other}/{mine}"])}
        time.sleep(0.02)
    return mine
