"""tools/make_shards.py as people run it: on folders and tables, with broken files, killed in the middle."""

import csv
import hashlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from ldm.config import DataConfig
from ldm.data.loader import Loader
from ldm.data.tables import rows
from ldm.errors import UserError
from ldm.locks import held

from .shard_maker import TOOL, command, make, picture, records


def hashes(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.iterdir())}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve good pictures in two folders, of three formats, and one of each fault."""
    root = tmp_path / "pictures"
    (root / "sub dir").mkdir(parents=True)
    for i in range(12):
        stem = root / ("sub dir" if i % 2 else ".") / f"photo.v{i}"
        kind = ("png", "jpg", "webp")[i % 3]
        Path(f"{stem}.{kind}").write_bytes(picture(i, (40 + i, 30), {"jpg": "JPEG"}.get(kind, kind.upper())))
        if i % 4:
            Path(f"{stem}.txt").write_text(f"picture \u2116 {i}\n", encoding="utf-8")
        else:
            Path(f"{stem}.json").write_text(json.dumps({"caption": f"picture \u2116 {i}", "author": "me"}))
    (root / "broken.png").write_bytes(picture(50)[:100])
    (root / "broken.txt").write_text("a broken picture")
    (root / "mute.png").write_bytes(picture(51))
    (root / "latin.png").write_bytes(picture(52))
    (root / "latin.txt").write_bytes("gr\u00fcn".encode("latin-1"))
    (root / "anim.gif").write_bytes(b"GIF89a")
    (root / "notes.md").write_text("not a picture")
    return root


def test_a_folder_becomes_shards_that_train_and_a_report_of_what_was_left_out(folder, tmp_path):
    done = make(folder, tmp_path / "out", "--per-shard", 5, "--size", 16)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["samples"] == 12
    assert report["left_out"] == {
        "the picture does not decode": ["broken.png"],
        "no caption": ["mute.png"],
        "the caption is not UTF-8": ["latin.png"],
        "its format is not read; convert it to webp, png, jpg, jpeg": ["anim.gif"],
    }
    assert "12 samples in 4 shards" in done.stdout and "left out 1: no caption (mute.png)" in done.stdout
    assert done.stderr == ""  # no progress bar in a pipe
    found = records(tmp_path / "out")
    assert sorted(r.fields["txt"].decode() for r in found) == sorted(f"picture \u2116 {i}" for i in range(12))
    for record in found:
        meta = json.loads(record.fields["json"])
        assert (folder / meta["file"]).exists() and set(record.fields) == {"webp", "txt", "json"}
        assert min(Image.open(io.BytesIO(record.fields["webp"])).size) == 16
    assert [json.loads(r.fields["json"])["author"] for r in found if b"author" in r.fields["json"]] == ["me"] * 3
    loader = Loader(DataConfig(shards=f"{tmp_path}/out/train-*.tar", size=16, streams=2, workers=0), 12, 0, 1, 0)
    assert len(set(next(iter(loader)).key)) == 12


def test_pictures_are_kept_as_they_are_where_nothing_is_to_be_done(folder, tmp_path):
    make(folder, tmp_path / "out", "--format", "jpg")
    for record in records(tmp_path / "out"):
        name = json.loads(record.fields["json"])["file"]
        same = record.fields["jpg"] == (folder / name).read_bytes()
        assert same == name.endswith("jpg")
    make(folder, tmp_path / "png", "--format", "png", "--size", 1000)  # nothing is enlarged
    assert {Image.open(io.BytesIO(r.fields["png"])).height for r in records(tmp_path / "png")} == {30}


def test_the_same_pictures_make_the_same_bytes_and_stay_on_their_side(folder, tmp_path):
    options = ("--holdout", 0.4, "--per-shard", 4)
    make(folder, tmp_path / "one", *options)
    make(folder, tmp_path / "two", *options, "--workers", "2")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert {name.split("-")[0] for name in hashes(tmp_path / "one")} == {"train", "val", "report.json", "shards.json"}
    held = {json.loads(r.fields["json"])["file"] for r in records(tmp_path / "one", "val-*")}
    (folder / "new.png").write_bytes(picture(99))
    (folder / "new.txt").write_text("new")
    make(folder, tmp_path / "three", *options)
    assert held == {json.loads(r.fields["json"])["file"] for r in records(tmp_path / "three", "val-*")} - {"new.png"}
    failed = make(folder, tmp_path / "one", *options, code=1)
    assert "holds shards of other pictures" in failed.stderr
    failed = make(folder, tmp_path / "three", code=1)
    assert "holds shards of other options" in failed.stderr


def test_of_few_pictures_one_is_held_out_too(folder, tmp_path):
    """Else the training that is printed behind it finds no val shards."""
    report = json.loads((make(folder, tmp_path, "--holdout", 0.0001), tmp_path / "report.json")[1].read_text())
    assert report["splits"] == {"train": 11, "val": 1}


def test_two_do_not_write_into_one_folder(folder, tmp_path):
    with held(tmp_path / "out"):
        done = subprocess.run(command(folder, tmp_path / "out"), capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith(f"error: process {os.getpid()} on ")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def heed_interrupts() -> None:
    """Where the tests were started in the background, a shell has told them, and so their children, to ignore these."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, how):
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(28):
        (root / f"{i}.png").write_bytes(picture(i, (200, 200)))
        (root / f"{i}.txt").write_text(f"picture {i}")
    options = ("--per-shard", 2, "--quality", 100)
    process = subprocess.Popen(
        command(root, tmp_path / "out", *options), stderr=subprocess.PIPE, preexec_fn=heed_interrupts
    )
    while len(list((tmp_path / "out").glob("train-*.tar"))) < 2:
        time.sleep(0.005)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)  # ends only when the worker processes, too, have gone
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    assert b"Traceback" not in errors
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("train-*.tar")}
    assert 2 <= len(before) < 14
    known = json.loads((tmp_path / "out" / "shards.json").read_text())["shards"]
    make(root, tmp_path / "out", *options)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items() if path.name in known)
    for stray in (tmp_path / "out").glob(".*.tmp"):  # what kill -9 leaves; a dot file that no pattern matches
        stray.unlink()
    make(root, tmp_path / "whole", *options)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_table_names_pictures_and_captions(folder, tmp_path, kind):
    lines = [
        {"path": "photo.v0.png", "text": "first, with a comma", "rating": "5"},
        {"path": "photo.v0.png", "text": "the same again", "rating": "4"},
        {"path": "sub dir/photo.v1.jpg", "text": "", "rating": "3"},
        {"path": "gone.png", "text": "gone", "rating": "2"},
        {"path": "broken.png", "text": "broken", "rating": "1"},
    ]
    table = tmp_path / f"table.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, lines)))
    else:
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(lines)
    columns = ("--image-column", "path", "--caption-column", "text")
    make(folder, tmp_path / "out", "--table", table, *columns)
    found = {r.fields["txt"].decode(): json.loads(r.fields["json"]) for r in records(tmp_path / "out")}
    assert found == {
        "first, with a comma": {"rating": "5", "file": "photo.v0.png"},
        "the same again": {"rating": "4", "file": "photo.v0.png"},
    }
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["left_out"] == {
        "the caption is empty": ["sub dir/photo.v1.jpg"],
        "no such picture": ["gone.png"],
        "the picture does not decode": ["broken.png"],
    }
    failed = make(folder, tmp_path / "other", "--table", table, code=1)
    first = "line 1" if kind == "jsonl" else "line 2"
    assert (
        f"{first} has no column" in failed.stderr
        and "has no column 'image' (it has: path, text, rating)" in failed.stderr
    )
    assert not (tmp_path / "other").exists()


def test_bad_tables_and_folders_end_in_a_sentence(folder, tmp_path, monkeypatch):
    broken, odd, none = tmp_path / "t.jsonl", tmp_path / "t.xlsx", tmp_path / "none"
    broken.write_text('{"image": "a.png", "caption": "x"}\n{"image": ')
    odd.write_text("x")
    none.mkdir()

    def refused(pictures: Path, *options: object) -> str:
        monkeypatch.setattr(sys, "argv", command(pictures, tmp_path / "out", *options)[1:])
        with pytest.raises(UserError) as caught:
            runpy.run_path(str(TOOL))["main"]()
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "t.jsonl, line 2 is not valid JSON" in refused(folder, "--table", broken)
    deep, torn, more = tmp_path / "deep.jsonl", tmp_path / "torn.csv", tmp_path / "more.csv"
    deep.write_text('{"image": ' + "[" * 100_000)
    torn.write_text('image,caption\na.png,"a\n')
    more.write_text("image,caption\na.png,a cat, sitting\n")
    assert "deep.jsonl, line 1 is not valid JSON" in refused(folder, "--table", deep)
    assert "is not valid CSV" in refused(folder, "--table", torn)
    assert "more.csv, line 2 has more cells than the header" in refused(folder, "--table", more)
    assert "is not a .csv, .tsv, .jsonl or .parquet file" in refused(folder, "--table", odd)
    assert "no such file or folder" in refused(folder, "--table", tmp_path / "gone.csv")
    assert "has no pictures" in refused(none)
    assert "is not a folder" in refused(tmp_path / "nowhere")
    assert "need --table" in refused(folder, "--caption-column", "text")
    (none / ".cache").mkdir()
    assert "has no pictures" in refused(none) and ".cache was not read: it is hidden" in refused(none)
    assert "--holdout is 1.5; it must be between 0 and 0.99" in refused(folder, "--holdout", 1.5)
    assert "--size is 'many'; it must be a whole number" in refused(folder, "--size", "many")


def test_parquet_is_read(folder, tmp_path, monkeypatch):
    from pyarrow import Table, parquet

    table = tmp_path / "t.parquet"
    parquet.write_table(Table.from_pylist([{"image": "photo.v0.png", "caption": "x", "n": 3}]), table)
    make(folder, tmp_path / "out", "--table", table)
    assert json.loads(records(tmp_path / "out")[0].fields["json"])["n"] == 3
    assert list(rows(table)) == [(f"{table}, row 1", {"image": "photo.v0.png", "caption": "x", "n": 3})]
    table.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="does not parse"):
        list(rows(table))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow: pip install"):
        list(rows(table))


@pytest.mark.parametrize("changed", ["0.txt", "0.png"])
def test_what_was_changed_meanwhile_is_not_taken_for_what_was_read(tmp_path, changed):
    """Of the same length, as a corrected caption may be; a caption that was not there before, too."""
    root = tmp_path / "pictures"
    root.mkdir()
    (root / "0.png").write_bytes(picture(0, (20, 20)))
    (root / "0.txt").write_text("a cat")
    make(root, tmp_path / "out")
    content = (root / changed).read_bytes()
    (root / changed).write_bytes(content)
    os.utime(root / changed, ns=(0, 0))
    assert "holds shards of other pictures" in make(root, tmp_path / "out", code=1).stderr
    (root / "0.json").write_text("{}")
    make(root, tmp_path / "new")
    (root / "0.json").unlink()
    assert "holds shards of other pictures" in make(root, tmp_path / "new", code=1).stderr


@pytest.mark.parametrize("manifest", ["[]", "{}", "[" * 100_000])
def test_a_manifest_that_is_none(folder, tmp_path, manifest):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shards.json").write_text(manifest)
    said = make(folder, tmp_path / "out", code=1).stderr
    assert "shards.json" in said and said.startswith("error: ") and said.count("\n") == 1


def test_captions_that_no_utf8_holds_are_left_out(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for name in "ab":
        (root / f"{name}.png").write_bytes(picture(0, (20, 20)))
    (root / "a.json").write_text(r'{"caption": "x\ud800"}')
    (root / "b.json").write_text(r'{"captions": ["x\ud800", "y"]}')
    table = tmp_path / "t.jsonl"
    table.write_text(r'{"image": "a.png", "caption": "x\ud800"}' + "\n" + r'{"image": "b.png", "caption": "y"}')
    for words in ([], ["--table", table]):
        out = tmp_path / f"out{len(words)}"
        make(root, out, *words)
        assert json.loads((out / "report.json").read_text())["left_out"] == {"the caption is not UTF-8": ["a.png"]}
        assert [record.fields["txt"] for record in records(out)] == [b"y"]


def test_a_set_of_nothing_but_bad_pictures_fails(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(b"x")
    (tmp_path / "p" / "a.txt").write_text("x")
    assert "none of the pictures can be used" in make(tmp_path / "p", tmp_path / "out", code=1).stderr


def test_file_names_need_not_be_utf8(tmp_path):
    root = os.fsencode(tmp_path / "p")
    os.mkdir(root)
    for name, content in ((b"\xff\xfe.png", picture()), (b"\xff\xfe.txt", b"x")):
        with open(os.path.join(root, name), "wb") as file:
            file.write(content)
    make(tmp_path / "p", tmp_path / "out")
    assert [json.loads(r.fields["json"])["file"] for r in islice(records(tmp_path / "out"), 2)] == [r"\udcff\udcfe.png"]
