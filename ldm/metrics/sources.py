"""Pictures to be measured, and their captions: from a folder, from tar shards, or just drawn into a folder.

A source is a set: its pictures are put in the order of their contents' hashes, so that no figure depends on the order
they lie in, not even one that is estimated on random subsets. Pictures are brought to one size as in training: the
middle square, resized by Pillow's antialiased bicubic filter on 8 bits (of the filters in use that one and only that
one agrees between libraries; Parmar et al. 2022).
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ldm.data.folders import UNREAD, Picture, caption_fields, find_pictures, read_file
from ldm.data.samples import NO_CAPTION, PICTURES, choose_caption, decode_picture, read_meta
from ldm.data.shards import BadSample, Members, Record, ShardReader, ShardSet, open_set
from ldm.data.transforms import square, to_tensor
from ldm.errors import UserError, explain_os_error
from ldm.jobs import Request, read_prompts

logger = logging.getLogger(__name__)

RESIZE = "middle square, Pillow bicubic, antialiased, 8 bits"


@dataclass(frozen=True)
class Item:
    """One picture: the sha256 of its file, its caption ("" where it has none), and where it lies."""

    digest: str
    caption: str
    place: Path | tuple[int, int]  # a file, or (shard, number in it)


@dataclass(frozen=True, eq=False)
class Source:
    """A set of pictures, in the order of their digests."""

    name: str  # as the user named it
    items: tuple[Item, ...]
    where: Mapping[str, Sequence[str]]
    shards: ShardSet | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def digest(self) -> str:
        """sha256, in hex, of all pictures' contents, whatever their names and order."""
        return hashlib.sha256("".join(item.digest for item in self.items).encode()).hexdigest()

    @property
    def captioned(self) -> bool:
        return all(item.caption for item in self.items)

    def images(self, start: int, stop: int, size: int) -> tuple[list[int], list[Tensor]]:
        """Numbers and pictures (3, size, size) in [-1, 1] of the items start to stop that can be decoded."""
        kept, images = [], []
        with ShardReader(self.shards.shards, self.shards.store) if self.shards else nullcontext() as reader:
            for number in range(start, min(stop, len(self))):
                place = self.items[number].place
                try:
                    content = place.read_bytes() if isinstance(place, Path) else _picture(reader, *place)  # type: ignore[arg-type]
                    images.append(to_tensor(square(decode_picture(content), size)))
                    kept.append(number)
                except BadSample:
                    continue
                except OSError as error:
                    raise explain_os_error(error, f"reading {place}") from error
        return kept, images

    def only(self, rows: Sequence[int]) -> Source:
        """The items of these numbers: those that decoded."""
        return replace(self, items=tuple(self.items[row] for row in rows))

    def protocol(self) -> dict[str, object]:
        """What a figure must say of it."""
        filtered = {"where": {name: list(values) for name, values in self.where.items()}} if self.where else {}
        return {"pictures": len(self), "hash": self.digest, **filtered}


def open_source(name: str, what: str, where: Mapping[str, Sequence[str]] | None = None) -> Source:
    """The pictures of a folder (all below it, with the captions beside them) or of tar shards.

    A picture that cannot be read is left out and one whose caption cannot be used has none, which is logged. `what`
    names the option in messages. Raises UserError for what is not there, or holds no pictures.
    """
    items, left_out, mute = [], Counter(), Counter()
    shards = None
    if Path(name).is_dir():
        if where:
            raise UserError(f"{what} is a folder, and its pictures have no fields; give shards to choose by field")
        found = find_pictures(Path(name), (*PICTURES, *UNREAD))
        left_out.update(reason for _, reason in found.left_out)
        for picture in sorted(found.pictures, key=lambda picture: picture.path):
            try:
                if picture.kind not in PICTURES:
                    raise BadSample("their format is not read")
                items.append(Item(_sha(read_file(picture.path)), _beside(picture, mute), picture.path))
            except BadSample as error:
                left_out[str(error)] += 1
        if not items:
            told = "".join(f"; left out, {count}: {reason}" for reason, count in left_out.items())
            raise UserError(f"{what}: the folder {name} has no pictures ({', '.join(PICTURES)}){told}")
    else:
        shards = open_set(name, what, _fault, where)
        with ShardReader(shards.shards, shards.store) as reader:
            for shard, index in enumerate(shards.shards):
                for number in range(len(index)):
                    try:
                        record = reader.read(shard, number)
                    except BadSample as error:
                        left_out[str(error)] += 1
                        continue
                    items.append(Item(_sha(_content(record)), _caption(record, mute), (shard, number)))
    for counts, words in (
        (left_out, "%d entries of %s are left out: %s"),
        (mute, "%d captions of %s are not used: %s"),
    ):
        for reason, count in counts.items():
            logger.warning(words, count, name, reason)
    return Source(name, _ordered(items), where or {}, shards)


def of_files(name: str, paths: Sequence[Path], captions: Sequence[str]) -> Source:
    """The pictures in these files, with a caption for each ("" for none). Raises UserError."""
    try:
        items = [Item(_sha(path.read_bytes()), caption, path) for path, caption in zip(paths, captions, strict=True)]
    except OSError as error:
        raise explain_os_error(error, f"reading {name}") from error
    return Source(name, _ordered(items), {})


def recaption(source: Source, captions: Sequence[str]) -> Source:
    """`source` with these captions, one for each picture in the order of their files' names or their place in shards.

    Raises UserError if there are more or fewer of them.
    """
    if len(captions) != len(source):
        raise UserError(f"there are {len(captions)} captions for the {len(source)} pictures of {source.name}")
    placed = sorted(source.items, key=lambda item: item.place)  # type: ignore[arg-type, return-value]
    return replace(source, items=_ordered([replace(i, caption=c) for i, c in zip(placed, captions, strict=True)]))


def read_captions(name: str, where: Mapping[str, Sequence[str]] | None = None) -> tuple[str, ...]:
    """Captions in their own order: of tar shards, or of a file as `jobs.read_prompts` takes it.

    Samples without one are left out, and that is logged. Raises UserError, also for a file with seeds or negative
    prompts of its own.
    """
    path = Path(name)
    if path.is_file() and path.suffix.lower() != ".tar":
        requests = read_prompts(path)
        if requests != [Request(request.prompt, seed=i) for i, request in enumerate(requests)]:
            raise UserError(
                f"{name} has labels, seeds or negative prompts of its own, and pictures to be measured have seeds from "
                "--seed on and none of the others; give a file of prompts alone"
            )
        return tuple(request.prompt for request in requests)
    return captions_of(open_source(name, "--captions", where))


def captions_of(source: Source) -> tuple[str, ...]:
    """Captions of the pictures in the order of their files' names or their place in shards, as `read_captions` does."""
    found = tuple(item.caption for item in sorted(source.items, key=lambda item: item.place) if item.caption)  # type: ignore[arg-type, return-value]
    if not found:
        raise UserError(f"none of the pictures of {source.name} has a caption")
    if len(found) < len(source):
        logger.warning(
            "%d of the %d pictures of %s have no caption", len(source) - len(found), len(source), source.name
        )
    return found


def _ordered(items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple(sorted(items, key=lambda item: (item.digest, item.caption)))


def _fault(members: Members) -> str | None:
    return None if any(members.get(name, (0, 0))[1] for name in PICTURES) else "no picture"


def _content(record: Record) -> bytes:
    return next(record.fields[name] for name in PICTURES if record.fields.get(name))


def _picture(reader: ShardReader, shard: int, number: int) -> bytes:
    return _content(reader.read(shard, number))


def _caption(record: Record, mute: Counter[str]) -> str:
    """ "" where there is none; why it cannot be used is counted in `mute`."""
    try:
        return choose_caption(record, read_meta(record), "txt", random.Random(0))
    except BadSample as error:
        mute.update({str(error)} - {NO_CAPTION})
        return ""


def _beside(picture: Picture, mute: Counter[str]) -> str:
    try:
        record = Record(picture.path.name, "", caption_fields(picture.beside))
    except BadSample as error:
        mute[str(error)] += 1
        return ""
    return " ".join(_caption(record, mute).split())


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
