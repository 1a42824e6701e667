"""A corpus of hostile and broken weight files, written when a test asks: CORPUS pairs each writer with what is said."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


class Malice:
    """Touches a file, if it is ever unpickled in earnest."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


# ---------------------------------------------------------------- torch files


def torch_zip(path: Path, program: bytes, entries: dict[str, bytes] | None = None, compress: bool = False) -> None:
    """An archive as torch writes it, with any pickle and storages."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in {"archive/data.pkl": program, **(entries or {})}.items():
            archive.writestr(name, content)


def tensor(key: str = "0", items: int = 4, shape: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,)) -> bytes:
    """The instructions that make a float32 tensor over a storage."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + text(key) + text("cpu") + number(items) + b"tQ"
    sides = b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, stride)) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + sides + b"\x89}tR"


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def program(*items: tuple[str, bytes]) -> bytes:
    """A pickle of {name: ...}."""
    return b"\x80\x02}(" + b"".join(text(name) + item for name, item in items) + b"u."


def system_for_a_tensor(path: Path) -> None:
    torch.save({"state_dict": {"x": Malice(path.parent / "executed")}}, path)


def system_as_the_whole(path: Path) -> None:
    torch.save(Malice(path.parent / "executed"), path)


def system_in_the_old_format(path: Path) -> None:
    torch.save({"x": Malice(path.parent / "executed")}, path, _use_new_zipfile_serialization=False)


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"x": Malice(path.parent / "executed")}))


def text_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"x": Malice(path.parent / "executed")}, protocol=0))


def system_as_an_instance(path: Path) -> None:
    """The instructions OBJ, INST, NEWOBJ_EX and BUILD, which call too."""
    command = text(f"touch {path.parent / 'executed'}")
    calls = (
        b"(cposix\nsystem\n" + command + b"o",
        b"(" + command + b"iposix\nsystem\n",
        b"cposix\nsystem\n" + command + b"\x85}\x92",
        b"cbuiltins\nobject\n)\x81}" + text("__setstate__") + b"cposix\nsystem\nsb" + command + b"b",
    )
    path.write_bytes(b"")
    torch_zip(path, program(*((f"call {i}", call) for i, call in enumerate(calls))))


def system_as_an_argument(path: Path) -> None:
    """Where a tensor's storage should be."""
    call = b"cposix\nsystem\n" + text(f"touch {path.parent / 'executed'}") + b"\x85R"
    torch_zip(path, program(("x", b"ctorch._utils\n_rebuild_tensor_v2\n(" + call + b"K\x00))\x89}tR")))


def torchscript(path: Path) -> None:
    torch_zip(path, program(("x", tensor())), {"archive/data/0": bytes(16), "archive/constants.pkl": b"\x80\x02)."})


def compressed_bomb(path: Path) -> None:
    torch_zip(path, program(("x", tensor(items=1 << 24, shape=(1 << 24,)))), {"archive/data/0": bytes(1 << 26)}, True)


def compressed_pickle(path: Path) -> None:
    torch_zip(path, b"\x80\x02" + b"]" * (1 << 26), compress=True)


def overlapping_entries(path: Path) -> None:
    """Many names for the same bytes: no compression needed for a bomb."""
    torch_zip(path, program(("x", tensor())), {"archive/data/0": bytes(16), "archive/data/1": bytes(16)})
    content = path.read_bytes()
    one, two = [i for i in range(len(content)) if content.startswith(b"PK\x01\x02", i)][1:]
    path.write_bytes(content[: two + 42] + content[one + 42 : one + 46] + content[two + 46 :])


def many_names_for_a_storage(path: Path) -> None:
    items = ((f"t{i}", tensor(items=1 << 16, shape=(1 << 16,))) for i in range(2000))
    torch_zip(path, program(*items), {"archive/data/0": bytes(1 << 18)})


def huge_view(path: Path) -> None:
    torch_zip(path, program(("x", tensor(shape=(1 << 40,), stride=(0,)))), {"archive/data/0": bytes(16)})


def view_beyond_its_storage(path: Path) -> None:
    torch_zip(path, program(("x", tensor(shape=(4,), stride=(1000,)))), {"archive/data/0": bytes(16)})


def storage_of_another_size(path: Path) -> None:
    torch_zip(path, program(("x", tensor(items=1 << 40, shape=(1 << 40,)))), {"archive/data/0": bytes(16)})


def missing_storage(path: Path) -> None:
    torch_zip(path, program(("x", tensor("../../etc/passwd"))), {"archive/data/0": bytes(16)})


def path_traversal(path: Path) -> None:
    torch_zip(path, program(("x", tensor())), {"archive/data/0": bytes(16), "../../outside": b"x"})


def archive_in_archive(path: Path) -> None:
    inner = io.BytesIO()
    torch.save({"x": torch.ones(3)}, inner)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.ckpt", inner.getvalue())


def twice_in_the_archive(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program(("x", tensor())))
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/data/0", bytes(16))


def twice_in_the_pickle(path: Path) -> None:
    torch_zip(path, program(("x", tensor()), ("x", tensor())), {"archive/data/0": bytes(16)})


def torn_archive(path: Path) -> None:
    torch.save({"x": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def endless_directory(path: Path) -> None:
    """The table of contents says that it is 3 GB long; the file is sparse."""
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(3 << 30)
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, (3 << 30) - 4, 4, 0))


def pickle_of_doublings(path: Path) -> None:
    """Each tuple holds the one before twice, and the last is a key: hashing it would take 2^60 steps."""
    double = b"K\x01q\x00" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
    )
    torch_zip(path, b"\x80\x02}(" + double + b"K\x01u.")


DOUBLED = b")" + b"2\x86" * 60  # a tuple of tuples, each of which is the one before twice: written out, 2^60 brackets
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"


def doublings_as_a_storage(path: Path) -> None:
    torch_zip(path, b"\x80\x02" + STORAGE + DOUBLED + text("cpu") + number(1) + b"tQ.")


def doublings_as_a_storage_of_the_old_format(path: Path) -> None:
    """The fifth of its pickles is the list of the storages' keys."""
    magic = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."
    path.write_bytes(magic + 3 * b"\x80\x02}." + b"\x80\x02]" + DOUBLED + b"a.")


def long_name_of_many(path: Path) -> None:
    """A hundred thousand tensors, in a list under a name of a million letters: 100 GB of names."""
    made = tensor(items=0, shape=(0,))
    torch_zip(
        path,
        b"\x80\x02}" + text("k" * 10**6) + b"](" + made + b"q\x00" + b"h\x00" * 10**5 + b"es.",
        {"archive/data/0": b""},
    )


def number_without_arithmetic(path: Path) -> None:
    storage = STORAGE.replace(b"Float", b"Untyped") + text("0") + text("cpu") + number(16) + b"tQ"
    made = (
        b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage + b"K\x00K\x02\x85K\x01\x85\x89}ctorch\nfloat4_e2m1fn_x2\ntR"
    )
    torch_zip(path, program(("x", made)), {"archive/data/0": bytes(16)})


def pickle_of_a_far_memo(path: Path) -> None:
    """Python's own machine makes room for all 2^31 numbers before this one."""
    torch_zip(path, b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".")


def pickle_of_a_long_buffer(path: Path) -> None:
    torch_zip(path, b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".")


def pickle_without_end(path: Path) -> None:
    torch_zip(path, b"\x80\x02" + b"]0" * 300_000 + b".")


def pickle_nested_deeply(path: Path) -> None:
    torch_zip(path, b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".")


def pickle_of_a_chain(path: Path) -> None:
    torch_zip(path, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


def pickle_in_a_circle(path: Path) -> None:
    torch_zip(path, b"\x80\x02]q\x00h\x00a.")


def number_of_megabytes(path: Path) -> None:
    torch_zip(path, b"\x80\x02}(\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b"K\x01u.")


# ---------------------------------------------------------------- safetensors


def safetensors(path: Path, header: object, body: bytes = b"", length: int | None = None) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + body)


def entry(dtype: str = "F32", shape: tuple[int, ...] = (4,), start: int = 0, end: int = 16) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def long_header(path: Path) -> None:
    safetensors(path, {"x": entry()}, bytes(16), 2**60)


def header_of_gigabytes(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 3 << 30) + b"{")
        file.truncate(4 << 30)


def torn(path: Path) -> None:
    save_file({"x": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1])


def flipped_bit(path: Path) -> None:
    save_file({"x": torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    content[12] ^= 1
    path.write_bytes(content)


def nested_header(path: Path) -> None:
    safetensors(path, b'{"x":' + b"[" * 5_000_000 + b"]" * 5_000_000 + b"}")


def gap(path: Path) -> None:
    safetensors(path, {"x": entry(), "y": entry(start=20, end=36)}, bytes(36))


def overlap(path: Path) -> None:
    safetensors(path, {"x": entry(), "y": entry(start=8, end=24)}, bytes(24))


def beyond_the_end(path: Path) -> None:
    safetensors(path, {"x": entry(end=1 << 40, shape=(1 << 38,))}, bytes(16))


def shape_of_another_size(path: Path) -> None:
    safetensors(path, {"x": entry(shape=(1 << 40, 1 << 40))}, bytes(16))


def negative_shape(path: Path) -> None:
    safetensors(path, b'{"x":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', bytes(16))


def unknown_dtype(path: Path) -> None:
    safetensors(path, {"x": entry("F31")}, bytes(16))


def rare_dtype(path: Path) -> None:
    safetensors(path, {"x": entry("C64", (2,))}, bytes(16))


def twice_in_the_header(path: Path) -> None:
    x = json.dumps(entry())
    safetensors(path, f'{{"x":{x},"x":{x}}}'.encode(), bytes(16))


def words_twice(path: Path) -> None:
    x = json.dumps(entry())
    safetensors(path, f'{{"__metadata__":{{"model":"a","model":"b"}},"x":{x}}}'.encode(), bytes(16))


def not_a_number(path: Path) -> None:
    save_file({"good": torch.ones(10), "spoilt.weight": torch.tensor([1.0, torch.nan])}, path)


def infinite_in_a_torch_file(path: Path) -> None:
    torch.save({"spoilt.weight": torch.tensor([1.0, torch.inf]).half()}, path)


def no_tensors(path: Path) -> None:
    safetensors(path, {})


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>404</html>")


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def control_codes(path: Path) -> None:
    """A name that clears the reader's screen, if it is printed as it is."""
    save_file({"\x1b[2J\nerror: all is well": torch.tensor([torch.nan])}, path)


DAMAGED = "truncated or damaged"
CORPUS: list[tuple[Callable[[Path], None], str]] = [
    (system_for_a_tensor, "holds no tensors"),
    (system_as_the_whole, "holds no tensors"),
    (system_in_the_old_format, "holds no tensors"),
    (bare_pickle, "torch.save did not write"),
    (text_pickle, "neither safetensors nor torch's"),
    (system_as_an_instance, "holds no tensors"),
    (system_as_an_argument, "a damaged list of contents"),
    (torchscript, "TorchScript"),
    (compressed_bomb, "compressed entry"),
    (compressed_pickle, "compressed entry"),
    (overlapping_entries, "overlap"),
    (many_names_for_a_storage, "again and again"),
    (huge_view, "larger than its storage"),
    (view_beyond_its_storage, "larger than its storage"),
    (storage_of_another_size, "another size"),
    (missing_storage, "lacks the storage"),
    (path_traversal, "a path outside itself"),
    (archive_in_archive, "not one that torch wrote"),
    (twice_in_the_archive, "twice"),
    (twice_in_the_pickle, "'x' twice"),
    (torn_archive, DAMAGED),
    (endless_directory, DAMAGED),
    (pickle_of_doublings, "holds no tensors"),
    (doublings_as_a_storage, "a storage without a size or name"),
    (doublings_as_a_storage_of_the_old_format, "does not hold the storages"),
    (long_name_of_many, "a name of more than 300 letters"),
    (number_without_arithmetic, "tensors of the type float4_e2m1fn_x2"),
    (pickle_of_a_far_memo, "holds no tensors"),
    (pickle_of_a_long_buffer, "a damaged list of contents"),
    (pickle_without_end, "more than 500,000 instructions"),
    (pickle_nested_deeply, "nested too deeply"),
    (pickle_of_a_chain, "holds no tensors"),
    (pickle_in_a_circle, "holds no tensors"),
    (number_of_megabytes, "thousands of digits"),
    (long_header, DAMAGED),
    (header_of_gigabytes, "which no model needs"),
    (torn, DAMAGED),
    (flipped_bit, DAMAGED),
    (nested_header, DAMAGED),
    (gap, DAMAGED),
    (overlap, DAMAGED),
    (beyond_the_end, DAMAGED),
    (shape_of_another_size, DAMAGED),
    (negative_shape, DAMAGED),
    (unknown_dtype, "a type of number that is not read"),
    (rare_dtype, "a type of number that is not read"),
    (twice_in_the_header, "'x' is set twice"),
    (words_twice, "'model' is set twice"),
    (not_a_number, "spoilt.weight"),
    (infinite_in_a_torch_file, "spoilt.weight"),
    (no_tensors, "holds no tensors"),
    (nothing, "empty"),
    (page, "neither safetensors nor torch's"),
    (pointer, "git lfs pull"),
    (pipe, "is not a file"),
    (folder, "a folder where a file is needed"),
    (control_codes, "not finite"),
]
