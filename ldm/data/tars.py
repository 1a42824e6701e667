"""The headers of a tar: which members it holds, and where their bytes lie.

The format is POSIX.1-1988 ustar with the long names of GNU tar ('L') and of POSIX.1-2001 pax ('x'). Python's tarfile
reads it too. We do not use that here, since an index of many shards is read at every start and shards come from
strangers: this reads a header for one `pread`, and no header makes it take more than `NAME_LIMIT` bytes of memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

BLOCK = 512
NAME_LIMIT = 2**16  # bytes of a long name or of a pax header

_ZEROS = bytes(BLOCK)
_FILES = b"07" + bytes(1)  # kinds that are plain files
_BARE = b"123456"  # links, devices, folders: nothing follows their header, whatever size it says


class NotATar(ValueError):
    """The file does not begin with the header of a tar."""


@dataclass(frozen=True)
class Contents:
    """`members` are (name, offset of the first byte, size) of the plain files, as they lie."""

    members: list[tuple[str, int, int]]
    end: int  # offset behind the last whole member
    torn: bool  # the block of zeros that ends a sound tar is not there


def read_headers(file: int, size: int) -> Contents:
    """Walk over the headers of the open file `file`, `size` bytes long.

    Stops at the first thing that is no header or does not fit into the file: what comes behind is lost. Raises NotATar
    if not even the first block is one, OSError if it cannot be read.
    """
    members: list[tuple[str, int, int]] = []
    offset, name, length, skip = 0, "", -1, False  # the last three are what a pax or GNU header says of the next
    while True:
        block = os.pread(file, BLOCK, offset)
        if block == _ZEROS:
            return Contents(members, offset, torn=False)
        header = _header(block)
        if header is None:
            if offset == 0:
                raise NotATar("it does not begin with a tar header")
            return Contents(members, offset, torn=True)
        kind, plain_name, plain_length = header
        if kind in b"Lx":
            content = os.pread(file, plain_length, offset + BLOCK) if plain_length <= NAME_LIMIT else b""
            found = _pax(content) if kind == ord("x") else {"path": content.rstrip(b"\0")}
            if len(content) != plain_length or found is None:
                return Contents(members, offset, torn=True)
            name = found.get("path", name.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
            length = int(found["size"]) if "size" in found else length
            skip = skip or any(key.startswith("GNU.sparse") for key in found)
            offset += BLOCK + _padded(plain_length)
            continue
        size_here = 0 if kind in _BARE else plain_length if length < 0 else length
        if offset + BLOCK + size_here > size or kind == ord("S"):  # an old sparse file: its size is not what follows
            return Contents(members, offset, torn=True)
        shown = name or plain_name
        if kind in _FILES and not shown.endswith("/") and not skip:
            members.append((shown, offset + BLOCK, size_here))
        offset += BLOCK + _padded(size_here)
        name, length, skip = "", -1, False


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header(block: bytes) -> tuple[int, str, int] | None:
    """(kind, name, size), or None if the block's checksum says that it is no header."""
    if len(block) < BLOCK:
        return None
    claimed = _number(block[148:156])
    if claimed != 256 + sum(block[:148]) + sum(block[156:]):
        return None
    size = _number(block[124:136])
    if size is None or size < 0:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return block[156], name.decode("utf-8", "surrogateescape"), size


def _number(field: bytes) -> int | None:
    """Octal digits, or GNU's base 256 for what they cannot hold."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    text = field.split(b"\0", 1)[0].strip()
    if not text.isdigit():
        return None if text else 0
    try:
        return int(text, 8)
    except ValueError:
        return None


def _pax(content: bytes) -> dict[str, bytes] | None:
    """The records "LENGTH KEY=VALUE\\n" of a pax header; None if they do not parse."""
    found: dict[str, bytes] = {}
    position = 0
    while position < len(content):
        space = content.find(b" ", position)
        digits = content[position:space]
        if space < 0 or not digits.isdigit() or len(digits) > 6:
            return None
        record = content[space + 1 : position + int(digits)]
        key, equals, value = record.rstrip(b"\n").partition(b"=")
        if not equals or int(digits) <= len(digits) + 1:
            return None
        found[key.decode("utf-8", "replace")] = value
        position += int(digits)
    if not found.get("size", b"0").isdigit() or len(found.get("size", b"0")) > 18:
        return None
    return found
