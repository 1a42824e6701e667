"""Files by people who mean harm: each ends in one sentence, in little memory and time, and nothing in it is run."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ldm
from ldm import errors
from ldm.checkpoints import native
from ldm.checkpoints.opening import open_checkpoint
from ldm.checkpoints.reading import read_tensors
from ldm.config import DiffusionTraining, load
from ldm.errors import UserError

MEMORY = 600 << 20  # bytes that reading a small file may take, of addresses; the bombs below ask for more
SECONDS = 60


@pytest.fixture
def bounded() -> Iterator[None]:
    """In the test, memory ends soon (MemoryError), and time does (the alarm)."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)

    def alarm(*_: object) -> None:
        raise TimeoutError(f"not read within {SECONDS} s")

    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)


class Malice:
    """Touches a file, if it is ever unpickled in earnest."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


# ---------------------------------------------------------------- the corpus: each writes a file


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
    (unknown_dtype, DAMAGED),
    (rare_dtype, "a type of number that is not read"),
    (twice_in_the_header, "'x' twice"),
    (words_twice, "'model' twice"),
    (not_a_number, "spoilt.weight"),
    (infinite_in_a_torch_file, "spoilt.weight"),
    (no_tensors, "holds no tensors"),
    (nothing, "empty"),
    (page, "neither safetensors nor torch's"),
    (pointer, "git lfs pull"),
    (pipe, "is not a file"),
    (folder, "Is a directory"),
    (control_codes, "not finite"),
]


def read_all(path: Path) -> None:
    for _ in read_tensors(path).values():
        pass


@pytest.mark.parametrize(("write", "said"), CORPUS, ids=[write.__name__ for write, _ in CORPUS])
def test_each_ends_in_a_sentence(
    write: Callable[[Path], None], said: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "model.ckpt"
    write(path)
    request.getfixturevalue("bounded")
    with pytest.raises(UserError) as error:
        read_all(path)
    sentence = str(error.value)
    assert said in sentence and str(path) in sentence
    assert sentence.isprintable() and len(sentence) < 600
    with pytest.raises(UserError):
        open_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_malice_beside_tensors_is_inert(tmp_path: Path) -> None:
    """The original checkpoints name foreign classes beside their tensors; what these would do is not done."""
    torch.save({"state_dict": {"x": torch.ones(3)}, "callbacks": Malice(tmp_path / "executed")}, tmp_path / "a.ckpt")
    assert torch.equal(read_tensors(tmp_path / "a.ckpt")["x"], torch.ones(3))
    assert not (tmp_path / "executed").exists()


def test_the_corpus_is_dangerous(tmp_path: Path) -> None:
    """What the tests above prove is worth something only if the file does run where it is unpickled."""
    torch.save(Malice(tmp_path / "executed"), tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "executed").exists()


# ---------------------------------------------------------------- settings

YAML = {
    "aliases": ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "\n".join(f"{y}: &{y} [{','.join(['*' + x] * 9)}]"
                for x, y in zip("abcdefgh", "bcdefghi", strict=True)), "alias"),
    "tags": ("output: !!python/object/apply:os.system ['touch executed']\n", "tag:yaml.org,2002:python/object"),
    "depth": ("output: " + "[" * 100_000, "deep"),
    "length": ("# " + "x" * 2_000_000, "too long"),
    "interpolation": ("output: ${oc.env:HOME}", "interpolation"),
    "twice": ("output: a\noutput: b\n", "duplicate key"),
    "date": ("output: !!timestamp 2001-99-99", "month must be"),
    "number": ("output: " + "9" * 10_000, "digits"),
    "unknown": ("? " + "x" * 100_000 + "\n: 1", "unknown setting"),
    "binary": ("output: !!binary \xff", "ascii"),
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_hostile_yaml(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    load(DiffusionTraining)  # imports what it needs
    words, said = YAML[name]
    path = tmp_path / "run.yaml"
    path.write_text(words, encoding="utf-8")
    request.getfixturevalue("bounded")
    with pytest.raises(UserError) as error:
        load(DiffusionTraining, path)
    assert said in str(error.value) and str(path) in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


PIECES = (
    *("loop: {steps: 3}", "data: 3", "data: null", "data: {where: {1: a}}", "model: {multipliers: {0: 1}}"),
    *("sample: {prompts: {0: x}}", "1: 2", "null: 1", "${x}", "???", "1e999", "0x" + "f" * 5000),
    *("&a ", "*a", "<<: ", "!!set ", "!!float ", "!!binary a", "!!python/name:os.system "),
    *("{", "}", "[", "]", ":", "- ", "? ", "\n", "  ", "'", '"', "#", "|", "%", "---"),
)


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8))
def test_any_yaml_is_settings_or_a_sentence(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes("".join(words).encode("utf-8", "surrogatepass"))
    try:
        load(DiffusionTraining, path)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 1000


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_model_json_is_a_model_or_a_sentence(
    data: st.DataObject, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One field of the settings is anything: the model loads, or UserError."""
    plain = json.loads((tiny_checkpoint / "model.json").read_text())
    part = data.draw(st.sampled_from(["autoencoder", "text", "unet", "schedule"]))
    field = data.draw(st.sampled_from(sorted(plain[part])))
    likely = st.sampled_from([[None], [[1]], 0, -1, 1, 3, 10**6, 2**40, 0.5, [], [0], [1, 2, 3], [-1], "", "v", True])
    value = data.draw(likely | VALUES)
    path = tmp_path_factory.getbasetemp() / "any"
    if not path.exists():
        shutil.copytree(tiny_checkpoint, path)
    (path / "model.json").write_text(json.dumps({**plain, part: {**plain[part], field: value}}))
    try:
        ldm.load(path, device="cpu")
    except UserError as error:
        assert str(error).isprintable()


def test_weights_of_another_kind_of_number(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    state = load_file(tmp_path / "model" / "unet.safetensors")
    state["conv_in.weight"] = state["conv_in.weight"].long()
    save_file(state, tmp_path / "model" / "unet.safetensors")
    with pytest.raises(UserError, match=r"conv_in\.weight"):
        ldm.load(tmp_path / "model", device="cpu")


def test_models_too_large_for_any_machine(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Their settings are read before their weights are compared, and must not be built at any price."""
    plain = json.loads((tiny_checkpoint / "model.json").read_text())
    changes = (
        {"unet": {**plain["unet"], "blocks": 10**9}},
        {"unet": {**plain["unet"], "transformer_depth": 10**9}},
        {"text": {**plain["text"], "layers": 10**9}},
        {"text": {**plain["text"], "context_length": 10**6}},
        {"autoencoder": {**plain["autoencoder"], "multipliers": [1] * 5000}},
        {"schedule": {**plain["schedule"], "steps": 10**12}},
        {"image_size": 10**9},
    )
    for change in changes:
        (tmp_path / "model.json").write_text(json.dumps(plain | change))
        with pytest.raises(UserError, match="describes a model with"):
            native.read_config(tmp_path)


# ---------------------------------------------------------------- through the script


@pytest.mark.parametrize("write", [system_as_the_whole, compressed_bomb, long_header, not_a_number, pipe])
def test_the_script_says_it_and_ends(
    write: Callable[[Path], None],
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("txt2img", Path(__file__).parents[2] / "scripts" / "txt2img.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "model.safetensors"
    if write is not_a_number:
        parts = {name: load_file(tiny_checkpoint / f"{name}.safetensors") for name in native.PARTS}
        parts["unet"]["conv_in.weight"][0, 0, 0, 0] = torch.nan
        native.save(path, native.read_config(tiny_checkpoint), parts)
    else:
        write(path)
    words = ["txt2img.py", "--prompt", "a cat", "--steps", "1", "--model", str(path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        errors.run(script.main)
    out, err = capsys.readouterr()
    assert end.value.code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert str(path) in err and (write is not not_a_number or "unet.conv_in.weight" in err)
    assert not (tmp_path / "executed").exists()
