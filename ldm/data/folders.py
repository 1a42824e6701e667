"""Pictures in a folder, and the captions that lie beside them.

Folders below the folder are read too, and so are links to folders; each folder is read once, however many links lead to
it. What other programs keep for themselves (copies in .ipynb_checkpoints, thumbnails in @eaDir, ._x.jpg files) is not
read.

The caption of `a/cat.jpg` is `a/cat.txt`, else `a/cat.caption`, else what `a/cat.json` holds: an object with `caption`
or `captions`, a list of captions, or a caption. `CAT.TXT` is as good as `cat.txt` where no other picture has that name.
"""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.records import BadSample
from ldm.data.shards import SAMPLE_LIMIT
from ldm.data.tables import column_of
from ldm.errors import explain_os_error

UNREAD = ("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jxl", "psd", "svg", "tif", "tiff")  # not by training
CAPTIONS = ("txt", "caption", "json")  # the files beside a picture, the first one that is there counts
HIDDEN = frozenset(
    ("__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information")
)


@dataclass(frozen=True)
class Picture:
    """A file that is named like a picture; `beside` has the files with its caption, by their kind in CAPTIONS."""

    path: Path
    beside: Mapping[str, Path] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The suffix in lower case, without its dot."""
        return _split(self.path.name)[1]


@dataclass(frozen=True)
class Found:
    """What is in a folder: `left_out` has the folders and hidden pictures that were not read, each with the reason."""

    pictures: list[Picture]
    left_out: list[tuple[Path, str]]


def find_pictures(folder: Path, kinds: Collection[str]) -> Found:
    """The files below `folder` with a suffix among `kinds` (lower case, no dot), in no order that means anything.

    Raises UserError if `folder` itself cannot be read.
    """
    found = Found([], [])
    folders, links, seen = [folder], [], set()
    while folders or links:
        at = folders.pop() if folders else links.pop()  # links last, so that a folder keeps its own name
        try:
            status = os.stat(at)
            if (status.st_dev, status.st_ino) in seen:
                found.left_out.append((at, "it is a link to a folder that is read already"))
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(at) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as error:
            if at is folder:
                raise explain_os_error(error, f"reading {folder}") from error
            found.left_out.append((at, f"the folder cannot be read ({error.strerror})"))
            continue
        files = []
        for entry in entries:
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            kind = _split(entry.name)[1]
            if entry.name.startswith(".") or entry.name.lower() in HIDDEN:
                if is_folder or kind in kinds:
                    found.left_out.append((Path(entry.path), "it is hidden"))
            elif is_folder:
                (links if entry.is_symlink() else folders).append(Path(entry.path))
            elif kind in kinds or kind in CAPTIONS:
                files.append(entry.name)
        names = [name for name in files if _split(name)[1] in kinds]
        beside = _beside({_split(name)[0] for name in names}, files)
        found.pictures.extend(
            Picture(at / name, {kind: at / each for kind, each in beside[_split(name)[0]].items()}) for name in names
        )
    return found


def _beside(stems: Collection[str], files: Iterable[str]) -> dict[str, dict[str, str]]:
    """Name of a picture without suffix -> kind of caption -> the file of that kind."""
    found: dict[str, dict[str, str]] = {stem: {} for stem in stems}
    alike: dict[str, list[str]] = {}
    for stem in stems:
        alike.setdefault(_folded(stem), []).append(stem)
    for name in sorted(files, key=lambda name: (_split(name)[0] not in stems, name != name.lower(), name)):
        stem, kind = _split(name)
        owners = [stem] if stem in found else alike.get(_folded(stem), [])
        if kind in CAPTIONS and len(owners) == 1:
            found[owners[0]].setdefault(kind, name)
    return found


def _split(name: str) -> tuple[str, str]:
    stem, dot, kind = name.rpartition(".")
    return (stem, kind.lower()) if dot else (name, "")


def _folded(stem: str) -> str:
    """Equal for names that some file systems take for the same: those of a Mac spell an umlaut as two letters."""
    return unicodedata.normalize("NFC", stem).casefold()


# ---------------------------------------------------------------- what a file says


def read_file(path: str | Path) -> bytes:
    """All of a file. Raises BadSample for what cannot be read, is no plain file, or is larger than a sample may be."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("it is not a plain file")
        if status.st_size > SAMPLE_LIMIT:
            raise BadSample("it is larger than 256 MiB")
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample(f"it cannot be read ({error.strerror})") from error


def caption_fields(beside: Mapping[str, Path]) -> dict[str, bytes]:
    """The fields `txt` and `json` of a sample, of the files beside its picture. Raises BadSample."""
    fields = {kind: read_file(path) for kind, path in beside.items()}
    caption = fields.pop("caption", None)
    if "json" in fields:
        try:
            said = captioned(json.loads(fields["json"].decode("utf-8-sig")))
        except UnicodeDecodeError as error:
            raise BadSample("the json is not UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise BadSample("the json does not parse") from error
        fields["json"] = json.dumps(said).encode()
    return fields if caption is None else {"txt": caption, **fields}


def captioned(said: Any) -> dict[str, Any]:
    """What a json or a table's cell says of a picture, with `caption` (a text) or `captions` (a list) if it has any."""
    kept: dict[str, Any] = {}
    if isinstance(said, dict):
        kept, name = said, column_of(said, "caption") or column_of(said, "captions")
        said = said.get(name)
    if isinstance(said, list):
        each = [one.get(column_of(one, "caption")) if isinstance(one, dict) else one for one in said]
        return {**kept, "captions": [one for one in each if isinstance(one, str)]}
    return {**kept, "caption": said} if isinstance(said, str) else kept
