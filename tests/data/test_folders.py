"""Pictures in folders as people have them: hidden copies, links, captions of every kind, and files that are bad."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.folders import find_pictures
from ldm.errors import UserError

from .shard_maker import TOOL, left_out, make, picture, records

sys.path.insert(0, str(TOOL.parent))

import make_shards


def test_captions_of_every_kind_lie_beside(tmp_path):
    """In any case of their names; a file in the picture's own case goes first, one that fits two belongs to none."""
    root, out = tmp_path / "pictures", tmp_path / "out"
    root.mkdir()
    beside = {
        "UPPER.TXT": "upper",
        "cap.caption": "of a caption file",
        "both.txt": "the txt's",
        "both.caption": "the caption's",
        "list.json": '["first", {"caption": "second"}, 3, ""]',
        "one.json": '"a text"',
        "Said.JSON": '\ufeff{"Caption": "in another case", "n": 1}',
        "more.json": '{"caption": ["one", "two"]}',
        "cafe\u0301.txt": "of a Mac",
        "twin.txt": "lower",
        "TWIN.txt": "higher",
        "Two.txt": "whose?",
        "none.json": "7",
        "latin.caption": None,
    }
    for number, (name, text) in enumerate(beside.items()):
        (root / name).write_bytes(b"\xfc" if text is None else text.encode())
        stem = {"UPPER": "upper", "Said": "said", "cafe\u0301": "caf\u00e9", "Two": "two"}.get(name[: name.index(".")])
        if name != "both.caption":
            (root / f"{stem or name[: name.index('.')]}.png").write_bytes(picture(number, (20, 20)))
    (root / "TWO.png").write_bytes(picture(99))
    make(root, out)
    found = {json.loads(r.fields["json"])["file"].removesuffix(".png"): r for r in records(out)}
    assert {name: record.fields["txt"].decode() for name, record in found.items()} == {
        "upper": "upper", "cap": "of a caption file", "both": "the txt's", "list": "first", "one": "a text",
        "said": "in another case", "more": "one", "caf\u00e9": "of a Mac", "twin": "lower", "TWIN": "higher",
    }  # fmt: skip
    assert json.loads(found["list"].fields["json"])["captions"] == ["first", "second", ""]
    assert left_out(out) == {
        "no caption": ["TWO.png", "none.png", "two.png"], "the caption is not UTF-8": ["latin.png"],
    }  # fmt: skip
    before = {one.name: one.stamps for one in make_shards.from_folder(root)[0]}
    os.utime(root / "cap.caption", ns=(0, 0))
    after = {one.name: one.stamps for one in make_shards.from_folder(root)[0]}
    assert [name for name in before if before[name] != after[name]] == ["cap.png"]  # another set, to a run that goes on


def test_one_bad_picture_never_ends_the_work(tmp_path):
    root, out = tmp_path / "pictures", tmp_path / "out"
    root.mkdir()
    Image.new("RGB", (16_384, 8)).save(root / "long.png")
    Image.new("CMYK", (20, 20), (10, 200, 30, 0)).save(root / "cmyk.jpg")
    Image.new("P", (20, 20)).save(root / "palette.png")
    Image.fromarray(np.full((20, 20), 30_000, np.uint16)).save(root / "deep.png")
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for kind in ("webp", "png"):
        frames[0].save(root / f"moves-{kind}.{kind}", save_all=True, append_images=frames[1:], lossless=True)
    whole = picture(1, (60, 60), "JPEG")
    (root / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "empty.jpg").touch()
    (root / "other.webp").write_bytes(picture(2, (20, 20), "JPEG"))  # named as what it is not
    (root / "pair.jpg").write_bytes(picture(3, (20, 20), "JPEG"))
    (root / "pair.png").write_bytes(picture(3, (20, 20)))
    (root / "half.jpg").write_bytes(picture(4, (20, 20), "JPEG"))
    (root / "half.png").touch()
    (root / "folder.jpg").mkdir()
    (root / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "round.jpg").symlink_to("round.jpg")
    os.mkfifo(root / "pipe.jpg")
    for path in list(root.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    (root / "mute.png").write_bytes(picture(5, (20, 20)))
    (root / "mute.txt").mkdir()
    (root / "png").write_bytes(picture(6, (20, 20)))  # named like a kind, it is of none
    done = make(root, out)
    found = {json.loads(r.fields["json"])["file"]: r.fields["webp"] for r in records(out)}
    assert sorted(found) == [
        "cmyk.jpg", "deep.png", "half.jpg", "moves-png.png", "moves-webp.webp", "other.webp", "pair.png", "palette.png",
    ]  # fmt: skip
    for content in found.values():
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "WEBP" and not image.is_animated
    assert left_out(out) == {
        "it is over 16383 pixels long, more than webp holds; try --size or png": ["long.png"],
        "the picture does not decode": ["torn.jpg"],
        "it is an empty file": ["empty.jpg"],
        "another picture has its name": ["half.png", "pair.jpg"],
        "it cannot be read (No such file or directory)": ["gone.jpg"],
        "it cannot be read (Too many levels of symbolic links)": ["round.jpg"],
        "it is not a plain file": ["pipe.jpg"],
        "no caption": ["mute.png"],
    }
    assert "left out 1: it is an empty file (empty.jpg)" in done.stdout
    make(root, tmp_path / "png", "--format", "png")
    assert "long.png" in {json.loads(r.fields["json"])["file"] for r in records(tmp_path / "png")}


def test_hidden_copies_are_not_taken_and_each_folder_once(tmp_path):
    root, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for at, name in (
        (root, "cat"), (root / ".ipynb_checkpoints", "cat-checkpoint"), (root / ".git" / "deep", "a"),
        (root / "sub" / "@eaDir", "b"), (root / "__MACOSX", "c"), (root / "z", "last"), (elsewhere, "other"),
    ):  # fmt: skip
        at.mkdir(parents=True)
        (at / f"{name}.png").write_bytes(picture(len(name), (20, 20)))
        (at / f"{name}.txt").write_text(name)
    (root / "._cat.png").write_bytes(b"\0\5")
    (root / "sub" / "up").symlink_to(root)
    (root / "a").symlink_to(root / "z")  # before it in the order of names, and yet not its name
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root / "linked")
    make(root, tmp_path / "out")
    files = {json.loads(r.fields["json"])["file"] for r in records(tmp_path / "out")}
    assert files == {"cat.png", "z/last.png", "linked/other.png"}
    assert left_out(tmp_path / "out") == {
        "it is hidden": ["._cat.png", ".git", ".ipynb_checkpoints", "__MACOSX", "sub/@eaDir"],
        "it is a link to a folder that is read already": ["a", "linked/back", "sub/up"],
    }
    (asked,) = find_pictures(root / ".ipynb_checkpoints", ("png",)).pictures  # named by the user, it is no copy
    assert asked.path.name == "cat-checkpoint.png"


def test_a_folder_that_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "p" / "locked").mkdir(parents=True)
    (tmp_path / "p" / "a.png").write_bytes(picture())
    scandir = os.scandir

    def locked(path: os.PathLike[str]):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    found = find_pictures(tmp_path / "p", ("png",))
    assert [picture.path.name for picture in found.pictures] == ["a.png"]
    assert found.left_out == [(tmp_path / "p" / "locked", "the folder cannot be read (Permission denied)")]
    with pytest.raises(UserError, match="permission denied while reading"):
        find_pictures(tmp_path / "p" / "locked", ("png",))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("csv", 'Image;CAPTION;rating\na.png;"first; one";5\nb.png;second;\n;;\n'),
        ("csv", '\ufeff image\t caption\trating\na.png\t"first; one"\t5\nb.png\tsecond\n'),
        ("json", '[{"image": "a.png", "caption": ["first; one", "x"], "rating": "5"},'
                 ' {"Image": "b.png", "Caption": {"caption": "second"}}]'),
    ],
)  # fmt: skip
def test_tables_as_people_have_them(tmp_path, kind, text):
    root = tmp_path / "p"
    root.mkdir()
    for seed, name in enumerate("ab"):
        (root / f"{name}.png").write_bytes(picture(seed, (20, 20)))
    (tmp_path / f"t.{kind}").write_text(text)
    make(root, tmp_path / "out", "--table", tmp_path / f"t.{kind}")
    found = {json.loads(r.fields["json"])["file"]: r.fields for r in records(tmp_path / "out")}
    assert {name: fields["txt"] for name, fields in found.items()} == {"a.png": b"first; one", "b.png": b"second"}
    assert json.loads(found["a.png"]["json"])["rating"] == "5"


def test_a_table_names_what_no_file_can_be_called(tmp_path):
    root = tmp_path / "p"
    root.mkdir()
    (root / "a.png").write_bytes(picture(0, (20, 20)))
    names = ["a.png", "b\0.png", "c" * 300 + ".png", "", "a.png/d.png", "."]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"image": name, "caption": "x"}) for name in names))
    make(root, tmp_path / "out", "--table", tmp_path / "t.jsonl")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["samples"] == 1 and sum(map(len, report["left_out"].values())) == 5
