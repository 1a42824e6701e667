"""The report of a set of shards names what was put into it."""

from ldm.script import run

import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.index import parse

from .shard_maker import make, picture, sample, write_tar

TOOL = Path(__file__).parents[2] / "tools" / "check_shards.py"
sys.path.insert(0, str(TOOL.parent))

import check_shards  # noqa: E402


@pytest.fixture
def tool(monkeypatch, capsys):
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, words)])
        code = 0
        try:
            run(check_shards.main)
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_a_sound_set_is_reported_in_numbers_and_a_picture(tool, tmp_path):
    members = [[*sample(f"k{i}", i)] for i in range(6)]
    members[2] = [("k2.png", picture(2, (100, 30))), ("k2.txt", b"x" * 50)]
    for name, part in (("a", members[:4]), ("b", members[4:])):
        write_tar(tmp_path / f"{name}.tar", [member for each in part for member in each])
    code, out, _ = tool(f"{tmp_path}/*.tar", "--workers", 2, "--picture", tmp_path / "p.png", "--index")
    assert code == 0
    for part in (
        "shards      2, ",
        "samples     6, of which 6 good; in a shard 2 to 4, median 4",
        "no two samples have the same key",
        "no two samples have the same picture",
        "caption length, characters: 13 to 50, median 13",
        f"10 to 20{5:17d}  {'#' * 40}\n",
        f"40 to 80{1:17d}  {'#' * 8}\n",
        "shorter side, pixels: 24 to 30, median 24",
        f"1 to 1.0001{5:14d}",
        f"2 and more{1:15d}",
    ):
        assert part in out
    assert Image.open(tmp_path / "p.png").size[0] > 500
    index = parse((tmp_path / "b.tar.index").read_bytes(), "b.tar")
    assert index is not None and index.keys == ("k4", "k5")


def test_what_is_wrong_is_counted_by_reason_and_named(tool, tmp_path):
    members = [
        *sample("a", 1),
        *sample("b", 2),
        ("c.png", b"no"),
        ("c.txt", b"t"),
        ("d\x1b[2J.txt", b"t"),
        *sample("e", 1),
    ]
    whole = write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", [*sample("a", 7), *sample("z", 8)])
    (tmp_path / "2.tar").write_bytes(whole.read_bytes()[:4000])
    (tmp_path / "3.tar").write_bytes(b"hello")
    code, out, _ = tool(f"{tmp_path}/*.tar", "--workers", 0)
    assert code == 1
    for part in (
        "unusable    3.tar: it does not begin with a tar header",
        "torn        2.tar: what is whole is used",
        "bad         1: the picture does not decode (c)",
        "bad         1: no picture (d [2J)",
        "duplicates  1 with the key of another (1.tar#0 = 0.tar#0)",
        "duplicates  1 with the picture of another (0.tar#4 = 0.tar#0)",
    ):
        assert part in out
    assert "\x1b" not in out


def test_splits_may_number_their_samples_alike_and_share_no_picture(tool, tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(12):
        (tmp_path / "p" / f"{i}.png").write_bytes(picture(i))
        (tmp_path / "p" / f"{i}.txt").write_text("a thing")
    make(tmp_path / "p", tmp_path / "out", "--holdout", 0.4, "--per-shard", 3, "--format", "png")
    found = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert {"train-00000.tar", "train-00001.tar", "val-00000.tar"} <= set(found)
    code, out, _ = tool(f"{tmp_path}/out/*.tar", "--workers", 0)
    assert code == 0 and "no two samples have the same key" in out and "the same picture" in out
    (tmp_path / "out" / "train-00009.tar").write_bytes((tmp_path / "out" / "train-00000.tar").read_bytes())
    (tmp_path / "out" / "val-00009.tar").write_bytes((tmp_path / "out" / "train-00000.tar").read_bytes())
    code, out, _ = tool(f"{tmp_path}/out/*.tar", "--workers", 0)
    assert "duplicates  6 with the key of another" in out and "(train-00009.tar#0 = train-00000.tar#0" in out
    assert "duplicates  6 with the picture of another" in out  # a picture of training among the held-out ones


def test_nothing_that_can_be_used_is_an_error(tool, tmp_path):
    (tmp_path / "3.tar").write_bytes(b"hello")
    code, _, err = tool(f"{tmp_path}/*.tar", "--workers", 0)
    assert code == 1 and "none of the 1 shards has a sample that can be used (it does not begin with" in err
