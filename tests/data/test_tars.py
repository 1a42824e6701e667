"""Headers of tars as Python's tarfile reads them, torn and forged ones without harm."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.tars import BLOCK, NAME_LIMIT, Contents, NotATar, read_headers

FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0\n/"), min_size=1, max_size=70)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])


def read(path: Path) -> Contents:
    with open(path, "rb") as file:
        return read_headers(file.fileno(), os.fstat(file.fileno()).st_size)


def write(path: Path, members, format: int) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for i, (name, size, kind) in enumerate(members):
            info = tarfile.TarInfo(f"{i}/{name}")
            info.type, info.linkname = kind, "x"
            info.size = size if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(bytes(info.size)))


@given(st.lists(st.tuples(NAMES, st.integers(0, 1500), KINDS), min_size=1, max_size=6), FORMATS)
@settings(deadline=None, max_examples=60)
def test_we_read_what_tarfile_reads(tmp_path_factory, members, format):
    path = tmp_path_factory.mktemp("tars") / "x.tar"
    try:
        write(path, members, format)
    except ValueError:  # the plain format has no place for long names
        return
    with tarfile.open(path) as tar:
        wanted = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    found = read(path)
    assert found.members == wanted and not found.torn


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_torn_in_a_header_a_long_name_a_body_a_padding_or_the_end(tmp_path, format):
    """Cut at each block's first, middle and last byte: what lies wholly before the cut is found, nothing else."""
    path = tmp_path / "x.tar"
    name = "n" * (60 if format == tarfile.USTAR_FORMAT else 180)
    write(path, [(f"{name}{i}.txt", size, tarfile.REGTYPE) for i, size in enumerate((0, 1, 512, 700))], format)
    content, whole = path.read_bytes(), read(path)
    assert len(whole.members) == 4 and not whole.torn
    for block in range(1, whole.end // BLOCK + 1):
        for cut in (block * BLOCK - 1, block * BLOCK, block * BLOCK + 1, block * BLOCK + 300):
            if cut < BLOCK:
                continue
            path.write_bytes(content[:cut])
            found = read(path)
            assert found.members == [m for m in whole.members if m[1] + m[2] <= cut]
            assert found.torn == (cut < whole.end + BLOCK)
    path.write_bytes(content[:511])
    with pytest.raises(NotATar):
        read(path)


@given(st.integers(0, 4999), st.binary(min_size=1, max_size=40))
@settings(deadline=None, max_examples=80)
def test_bytes_written_over_a_tar_do_no_harm(tmp_path_factory, offset, garbage):
    path = tmp_path_factory.mktemp("tars") / "x.tar"
    write(path, [("n" * 120 + ".txt", 300, tarfile.REGTYPE)] * 3, tarfile.PAX_FORMAT)
    content = bytearray(path.read_bytes())
    content[offset : offset + len(garbage)] = garbage
    path.write_bytes(content)
    try:
        found = read(path)
    except NotATar:
        return
    assert all(at > 0 and at + size <= len(content) for _, at, size in found.members)


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    block = bytearray(BLOCK)
    block[: len(name)], block[124:136], block[156:157] = name, size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_a_name_of_a_gigabyte_is_not_read(tmp_path, kind):
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        file.write(header(b"a.txt", b"0", b"0") + header(b"long", b"%o" % 2**30, kind))
        file.truncate(2**30 + 4096)
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [name for name, _, _ in found.members] == ["a.txt"] and found.torn
    assert peak < 4 * NAME_LIMIT


@pytest.mark.parametrize("size", [b"77777777777", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-1", b"9", b"1e9"])
def test_a_size_that_cannot_be_ends_the_reading(tmp_path, size):
    path = tmp_path / "x.tar"
    path.write_bytes(header(b"a.txt", b"0", b"0") + header(b"b.txt", size, b"0") + bytes(2048))
    found = read(path)
    assert [name for name, _, _ in found.members] == ["a.txt"] and found.torn


def test_a_sparse_file_is_not_taken_for_a_plain_one(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"GNU.sparse.major": "1"}
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("b.txt"))
    assert [name for name, _, _ in read(path).members] == ["b.txt"]


def test_members_beyond_eight_gigabytes_are_found(tmp_path):
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:  # the file is sparse: it takes no room
        file.write(header(b"a.bin", b"\x80" + (9 * 2**30).to_bytes(11, "big"), b"0"))
        file.seek(9 * 2**30, 1)
        file.write(header(b"b.txt", b"0", b"0") + bytes(1024))
    assert read(path).members == [("a.bin", 512, 9 * 2**30), ("b.txt", 9 * 2**30 + 1024, 0)]
