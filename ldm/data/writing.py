"""Records -> shard: one tar, whole or not there at all, the same bytes for the same records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ldm.files import atomic_write


def write_shard(path: str | Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write (key, extension -> bytes) records to the tar `path` atomically; returns how many there were.

    Members carry no owner and no time, so that equal records make equal files. Raises UserError if the disk does
    not take it; nothing is left at `path` then, or the file that was there.
    """
    from webdataset.writer import TarWriter  # costs seconds to import, and readers do not need it

    count = 0
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        writer = TarWriter(file, user="", group="", mode=0o644, encoder=False, mtime=0)
        for key, fields in records:
            writer.write({"__key__": key, **fields})
            count += 1
        writer.close()
    return count
