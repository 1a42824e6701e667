"""torch.save's two containers, read as data: the zip archive (since torch 1.6) and the stream before it.

    archive/data.pkl      a pickle: names -> tensors, whose numbers are named by persistent ids, "storage 17"
    archive/data/17       the bytes of storage 17, not compressed, so that they can be mapped into memory
    archive/byteorder     "little"

Nothing is unpacked and nothing executed (pickles.py). Every size is checked against the file's own before anything is
held: entries may not be compressed or overlap, so no archive names more than it has; a view may not be larger than
its storage, so no tensor is.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ldm.checkpoints.pickles import BadPickle, Inert, Name, read_pickle
from ldm.checkpoints.places import Contents, Place

MAX_PICKLE = 64 << 20  # bytes; Stable Diffusion's has 0.3 million
MAX_DIRECTORY = 8 << 20  # bytes of the zip's table of contents; Stable Diffusion's has 0.2 million
MAX_NESTING = 8  # containers within containers that are looked into for tensors
MAX_SIDES = 16  # of a tensor's shape
MAX_NAME = 300  # letters of a tensor's name; a long one may stand before the names of many
MAX_SHARING = 4  # bytes of all tensors / bytes of the file: tied weights are stored once and named twice

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
_TYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
}
_STORAGES = {f"{home}.{name}Storage": dtype for home in ("torch", "torch.storage") for name, dtype in _TYPES.items()}
_NUMBERS = {*_TYPES.values(), torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64}


class BadArchive(Exception):
    """The file is no whole torch archive; the message is the reason, to follow "it" in a sentence."""


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    items: int


@dataclass(frozen=True)
class _View:
    """A tensor: part of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def read_zip(file: BinaryIO, size: int) -> Contents:
    """What the torch archive `file` of `size` bytes holds; raises BadArchive."""
    entries = _entries(file, size)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BadArchive("is a zip archive but not one that torch wrote (it has no data.pkl); unpack it first")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise BadArchive("is a TorchScript program, which is not run here; save the state_dict of its network")
    start, length = entries[pickles[0]]
    if length > MAX_PICKLE:
        raise BadArchive(f"has a list of contents of {length:,} bytes; no model needs more than {MAX_PICKLE:,}")
    if f"{root}byteorder" in entries and _bytes(file, entries[f"{root}byteorder"][0], 3) == b"big":
        raise BadArchive("was written on a big-endian machine, which is not supported")
    try:
        top, _ = read_pickle(_bytes(file, start, length), _BUILDERS, _storage)
    except BadPickle as error:
        raise BadArchive(f"has a damaged list of contents ({error})") from error

    def place(key: str) -> tuple[int, int]:
        if f"{root}data/{key}" not in entries:
            raise BadArchive(f"lacks the storage {key[:40]!r}")
        return entries[f"{root}data/{key}"]

    return _contents(top, place, size)


def read_stream(file: BinaryIO, size: int) -> Contents:
    """What `file`, as torch < 1.6 wrote it, holds: five pickles, then the storages. Raises BadArchive."""
    content = _bytes(file, 0, min(size, MAX_PICKLE))
    stored: dict[str, _Storage] = {}

    def persistent(argument: Any) -> _Storage:
        storage = _storage(argument)
        return stored.setdefault(storage.key, storage)

    try:
        magic, at = read_pickle(content, {}, _storage)
        if magic != _LEGACY_MAGIC:
            raise BadArchive("is a pickle that torch.save did not write, and was not opened")
        for _ in range(2):  # the protocol's version; what the machine was like
            _, at = read_pickle(content, {}, _storage, at)
        top, at = read_pickle(content, _BUILDERS, persistent, at)
        keys, at = read_pickle(content, {}, _storage, at)
    except BadPickle as error:
        raise BadArchive(f"is a pickle that cannot be read as data ({error})") from error
    plain = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not plain or sorted(keys) != sorted(stored):
        raise BadArchive("does not hold the storages that its tensors name")
    places = {}
    for key in keys:  # each: how many items, 8 bytes, then they
        length = stored[key].items * stored[key].dtype.itemsize
        if at + 8 + length > size or struct.unpack("<q", _bytes(file, at, 8))[0] != stored[key].items:
            raise BadArchive("is truncated or damaged")
        places[key] = (at + 8, length)
        at += 8 + length
    return _contents(top, places.__getitem__, size)


# ---------------------------------------------------------------- the zip


class _Bounded:
    """The file as zipfile reads it, which takes the whole table of contents at once, however long it says it is."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self.seekable, self._file = file.seek, file.tell, file.seekable, file

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"a table of contents of {count:,} bytes")
        return self._file.read(count)


def _entries(file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """Name -> (first byte, count of bytes) of each entry; raises BadArchive for what torch.save does not write."""
    entries: dict[str, tuple[int, int]] = {}
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:  # type: ignore[arg-type]
            listed = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error) as error:
        raise BadArchive(f"is truncated or damaged ({error}); copy it again") from error
    for info in listed:
        name = info.filename
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
            raise BadArchive(f"names a path outside itself ({name[:80]!r}), which only a malicious file does")
        if name in entries:
            raise BadArchive(f"has the entry {name[:80]!r} twice")
        if info.flag_bits & 1:
            raise BadArchive("is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise BadArchive(f"has a compressed entry ({name[:80]!r}), which torch.save does not write; save it anew")
        head = _bytes(file, info.header_offset, 30)
        if len(head) != 30 or not head.startswith(b"PK\x03\x04"):
            raise BadArchive("is truncated or damaged; copy it again")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
        if start + info.file_size > size:
            raise BadArchive("is truncated or damaged; copy it again")
        entries[name] = (start, info.file_size)
    end = 0
    for start, length in sorted(entries.values()):
        if start < end:
            raise BadArchive("has entries that overlap, which only a malicious file has")
        end = start + length
    return entries


def _bytes(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


# ---------------------------------------------------------------- what the pickle may build


def _storage(argument: Any) -> _Storage:
    """A persistent id: ("storage", class, key, where it was, how many items)."""
    if not isinstance(argument, tuple) or len(argument) < 5 or argument[0] != "storage":
        raise ValueError("a persistent id that is no storage")
    kind, key, items = argument[1], argument[2], argument[4]
    if not isinstance(kind, Name) or kind.name not in _STORAGES:
        raise ValueError(f"storages of the kind {kind.name if isinstance(kind, Name) else type(kind).__name__}")
    # Nothing but text: to spell out a tuple of tuples, which a few instructions double again and again, never ends.
    if type(items) is not int or items < 0 or not isinstance(key, str) or not 0 < len(key) <= 100:
        raise ValueError("a storage without a size or name")
    if len(argument) > 5 and argument[5] is not None:
        raise ValueError("a view of a storage")
    return _Storage(key, _STORAGES[kind.name], items)


def _tensor(arguments: tuple[Any, ...]) -> _View:
    """_rebuild_tensor and _rebuild_tensor_v2: (storage, offset, shape, stride, ...)."""
    storage, offset, shape, stride = arguments[:4]
    return _view(storage, offset, shape, stride, storage.dtype)


def _tensor_v3(arguments: tuple[Any, ...]) -> _View:
    """The same of an untyped storage; the seventh argument is the name of a type."""
    storage, offset, shape, stride = arguments[:4]
    name = arguments[6].name.removeprefix("torch.")
    dtype = getattr(torch, name, None) if name.isidentifier() else None
    if dtype not in _NUMBERS:
        raise ValueError(f"tensors of the type {name[:40]}")
    return _view(storage, offset, shape, stride, dtype)


def _view(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype) -> _View:
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor without numbers")
    if len(shape) != len(stride) or len(shape) > MAX_SIDES:
        raise ValueError("a tensor of an impossible shape")
    if any(type(n) is not int or not 0 <= n < 2**48 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor of an impossible shape")
    room = storage.items * storage.dtype.itemsize // dtype.itemsize
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if count else 0
    if count and (last >= room or count > room):
        raise ValueError("a tensor larger than its storage")
    return _View(storage, offset, shape, stride, dtype)


def _parameter(arguments: tuple[Any, ...]) -> _View:
    if not isinstance(arguments[0], _View):
        raise ValueError("a parameter that is no tensor")
    return arguments[0]


_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": lambda arguments: {},
    "collections.defaultdict": lambda arguments: {},
    "torch.nn.modules.container.ParameterDict": lambda arguments: {},
    "torch.Size": lambda arguments: arguments[0] if arguments else (),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


# ---------------------------------------------------------------- from nested containers to names


def _contents(top: Any, place: Callable[[str], tuple[int, int]], size: int) -> Contents:
    """Tensors by their dotted path; those of an outer `state_dict` alone if there is one. Plain words are metadata."""
    metadata = {}
    if isinstance(top, dict):
        metadata = {k: str(v) for k, v in top.items() if isinstance(k, str) and isinstance(v, str | int | float)}
        if isinstance(top.get("state_dict"), dict):
            top = top["state_dict"]
    places: dict[str, Place] = {}
    total = 0
    for name, view in _named(top):
        if name in places:
            raise BadArchive(f"has the tensor {name[:100]!r} twice")
        start, length = place(view.storage.key)
        if length != view.storage.items * view.storage.dtype.itemsize:
            raise BadArchive(f"has a storage of another size than the tensor {name[:100]!r} says")
        places[name] = Place(start, length, view.dtype, view.shape, view.stride, view.offset)
        total += places[name].bytes
        if total > MAX_SHARING * size:
            raise BadArchive("names its numbers again and again, which only a malicious file does")
    return Contents(places, metadata)


def _named(top: Any) -> Iterator[tuple[str, _View]]:
    """The tensors in nested dicts, lists and tuples, in order; a container that is met twice counts once."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", top, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        if isinstance(value, _View):
            yield name, value
        if depth == MAX_NESTING or id(value) in seen or not isinstance(value, dict | list | tuple):
            continue
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inner = [
            (_joined(name, str(key)), item, depth + 1)
            for key, item in items
            if isinstance(item, _View | dict | list | tuple) and not isinstance(key, Inert)
        ]
        waiting.extend(reversed(inner))


def _joined(name: str, key: str) -> str:
    if len(name) + len(key) >= MAX_NAME:
        raise BadArchive(f"has a tensor with a name of more than {MAX_NAME} letters ({f'{name}.{key}'[:60]!r}...)")
    return f"{name}.{key}" if name else key
