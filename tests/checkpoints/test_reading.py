"""Weight files come as they were written, as views of the file; what is accepted is what the libraries accept."""

from __future__ import annotations

import gc
import json
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoints import places
from ldm.checkpoints.reading import all_finite, read_metadata, read_tensors
from ldm.errors import UserError

torch.manual_seed(0)
SHARED = torch.randn(10)
STATE = {
    "a.weight": torch.randn(5, 4),
    "a.bias": torch.randn(7).half(),
    "count": torch.arange(6),
    "transposed": torch.randn(4, 3).t(),
    "brain": torch.randn(3).bfloat16(),
    "double": torch.randn(2, 2, 2, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "parameter": nn.Parameter(torch.randn(2)),
    "eighth": torch.randn(4).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5),
    "whole": SHARED,
    "part": SHARED[2:5],
}


class Foreign:
    """Of a class that the reader does not have, as lightning's callbacks in the original checkpoints."""

    def __init__(self) -> None:
        self.inner = {"x": torch.ones(3)}


def same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.ndim else bool(a == b)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_files_of_both_kinds_and_all_protocols(tmp_path: Path, zipped: bool, protocol: int) -> None:
    path = tmp_path / "model.ckpt"
    content = {
        "state_dict": OrderedDict(STATE),
        "global_step": 7,
        "callbacks": {Foreign: {"best": torch.ones(2)}, (1, 2): 3},
        "config": Foreign(),
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found = read_tensors(path)
    assert list(found) == list(STATE) and "part" in found and "config" not in found
    assert all(same(found[name], value.detach()) for name, value in STATE.items())
    assert read_metadata(path)["global_step"] == "7"


def test_names_are_paths_through_containers(tmp_path: Path) -> None:
    module = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save({"net": module.state_dict(), "optimizer": optimizer.state_dict(), "list": [SHARED]}, tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt")
    assert {"net.weight", "net.bias", "optimizer.state.0.exp_avg", "list.0"} <= set(found)
    assert torch.equal(found["net.weight"], module.weight)


def test_our_reading_agrees_with_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    theirs = torch.load(path, weights_only=True)
    ours = read_tensors(path)
    assert list(ours) == list(theirs) and all(same(ours[name], theirs[name].detach()) for name in theirs)


def write_safetensors(path: Path) -> dict[str, Tensor]:
    state = {name: value.detach().clone().contiguous() for name, value in STATE.items()}
    save_file(state, path, {"model": "words"})
    return state


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"  # the name says one thing, the bytes another
    state = write_safetensors(path)
    found = read_tensors(path)
    assert set(found) == set(state) and len(found) == len(state)
    assert all(same(found[name], value) for name, value in state.items())
    assert found.form("a.bias") == (torch.float16, (7,))
    assert read_metadata(path) == {"model": "words"}


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_tensors_are_views_of_the_file_and_leave_nothing_behind(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    value = torch.full((1000,), 3.0)
    if kind == "torch":
        torch.save({"x": value}, path)
    else:
        save_file({"x": value}, path)
    found = read_tensors(path)
    held = found["x"]
    content = path.read_bytes()
    with open(path, "r+b") as file:  # in place: what is mapped shows it, what was copied does not
        file.seek(content.index(struct.pack("<f", 3.0) * 1000))
        file.write(struct.pack("<f", 5.0))
    assert held[0] == 5 and held[1] == 3
    held[2] = 9  # private: the file does not see it
    assert struct.pack("<f", 9.0) not in path.read_bytes()
    assert len(found._file.live) == 1
    del held
    gc.collect()
    assert len(found._file.live) == 0


def test_chunks_hold_what_lies_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "CHUNK", 100)
    state = {f"t{i}": torch.randn(20 + i) for i in range(30)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for path in tmp_path.iterdir():
        found = read_tensors(path)
        kept = {name: found[name] for name in state}
        assert len(found._file.live) > 10
        assert all(torch.equal(kept[name], state[name]) for name in state)


def test_numbers_at_odd_places(tmp_path: Path) -> None:
    """The format lets a header end anywhere; the library's own writer aligns it."""
    value = torch.randn(3)
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    for padding in range(8):
        header = json.dumps({"x": entry}).encode() + b" " * padding
        (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + value.numpy().tobytes())
        assert torch.equal(read_tensors(tmp_path / "a")["x"], value)


def test_finite() -> None:
    assert all_finite(torch.arange(3)) and all_finite(torch.empty(0)) and all_finite(torch.ones(3, 2).t())
    assert all_finite(torch.full((1000,), 3e38)) and all_finite(torch.full((1000,), 6e4, dtype=torch.float16))
    assert all_finite(torch.full((10,), 1e300, dtype=torch.float64))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            value = torch.zeros(3, 100, dtype=dtype)
            value[1, 50] = bad
            assert not all_finite(value) and not all_finite(value.t())
    assert not all_finite(torch.tensor([torch.inf, -torch.inf]))


# ---------------------------------------------------------------- any bytes


def outcome(path: Path) -> dict[str, Tensor] | None:
    """All tensors, or None where reading ended in a sentence; another exception fails the test."""
    try:
        found = read_tensors(path)
        return {name: found[name] for name in found}
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
        return None


def safetensors_bytes(header: object, body: bytes) -> bytes:
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + body


WORDS = (
    ({"step": 1000}, {"step": "1000"}),
    ({"merged": True, "of": ["a", "b"], "ratio": {"unet": 0.5}, "none": None, "title": "x"},
     {"merged": "true", "of": '["a", "b"]', "ratio": '{"unet": 0.5}', "none": "null", "title": "x"}),
    (None, {}),
    (["a"], {"__metadata__": '["a"]'}),
)  # fmt: skip


@pytest.mark.parametrize(("written", "read"), WORDS)
def test_words_that_are_no_text(written: object, read: dict[str, str], tmp_path: Path) -> None:
    """The format allows text alone, and mergers write numbers: the weights are all there."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = {"__metadata__": written, "weight": entry}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, struct.pack("<f", 3.0)))
    found = read_tensors(tmp_path / "a.safetensors")
    assert found["weight"] == 3 and found.metadata == read


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 2**64), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "I64", "BOOL", "F4", "C64", "F8_E8M0", "x"]),
        "shape": st.lists(st.integers(0, 3) | st.integers(0, 2**64), max_size=3),
        "data_offsets": st.lists(st.integers(0, 40), min_size=1, max_size=3) | st.just([0, 8]) | st.just([8, 16]),
    }
)
HEADER = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRY | JSON, max_size=4).map(json.dumps)


@settings(max_examples=200, deadline=None)
@given(
    header=HEADER.map(str.encode) | st.binary(max_size=60).map(lambda inner: b"{" + inner + b"}"),
    lie=st.sampled_from([0, 0, 0, 0, -1, 1, 2**40, 2**60]),
    body=st.integers(0, 48).map(bytes) | st.binary(max_size=48),
)
def test_any_header_is_read_as_the_library_reads_it_or_refused(
    header: bytes, lie: int, body: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(header) + lie)) + header + body)
    found = outcome(path)
    try:
        plain = json.loads(header)
        words = plain.pop("__metadata__", None)
        if lie == 0 and words is not None and not all(isinstance(word, str) for word in words.values()):
            path.write_bytes(safetensors_bytes(plain, body))  # the library refuses these words, and is asked without
    except (ValueError, AttributeError):
        pass
    try:
        with safe_open(path, framework="pt") as stored:
            theirs = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, RuntimeError, AttributeError, OverflowError, TypeError):
        assert found is None
    else:
        assert found is None or (set(found) == set(theirs) and all(same(found[n], theirs[n]) for n in found))


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["zip", "stream", "safetensors"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=3)), min_size=1, max_size=3),
    cut=st.floats(0, 1) | st.just(1.0),
)
def test_any_damage_to_a_file_is_harmless_or_a_sentence(
    kind: str, edits: list[tuple[float, bytes]], cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = folder / f"whole.{kind}"
    if not whole.exists():
        if kind == "safetensors":
            write_safetensors(whole)
        else:
            content = {"state_dict": {"a": torch.ones(3), "b": torch.zeros(2, 2)}, "other": Foreign()}
            torch.save(content, whole, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(whole.read_bytes())
    for share, put in edits:
        place = int(share * len(content))
        content[place : place + len(put)] = put
    broken = folder / "broken"
    broken.write_bytes(content[: int(cut * len(content))])
    outcome(broken)


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from([b"PK\x03\x04", b"\x80\x02", b"\x80\x04", struct.pack("<Q", 2), b""]), rest=st.binary())
def test_any_bytes_at_all(start: bytes, rest: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(start + rest)
    assert not outcome(path)


def test_numbers_of_the_other_byte_order_are_not_taken_for_ours(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "little.ckpt")
    with zipfile.ZipFile(tmp_path / "little.ckpt") as old, zipfile.ZipFile(tmp_path / "big.ckpt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("/byteorder") else old.read(name))
    assert torch.equal(read_tensors(tmp_path / "little.ckpt")["a"], torch.ones(2))
    with pytest.raises(UserError, match="was written on a big-endian machine"):
        read_tensors(tmp_path / "big.ckpt")
