"""Naming shards, indexing them whole, torn and odd, and filtering their samples."""

import io
import json
import tarfile
from array import array
from collections import OrderedDict

import pytest

from ldm.data import samples
from ldm.data.shards import BadSample, ShardIndex, ShardReader, Tally, expand, index_shard, open_set
from ldm.data.writing import write_shard
from ldm.errors import UserError

from .shard_maker import sample, write_tar


def test_globs_braces_commas_and_spaces_name_files_once(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b-07.tar", "with space.tar"):
        write_tar(tmp_path / name, [])
    text = f"{tmp_path}/b-{{07..07}}.tar, {tmp_path}/a-*.tar\n{tmp_path}/a-{{0,1}}.tar"
    assert [path.name for path in expand(text)] == ["b-07.tar", "a-0.tar", "a-1.tar"]
    assert [path.name for path in expand(f"{tmp_path}/with space.tar")] == ["with space.tar"]
    assert [path.name for path in expand(f"{tmp_path}/with sp*.tar")] == ["with space.tar"]


def test_what_matches_nothing_is_named(tmp_path):
    write_tar(tmp_path / "a-0.tar", [])
    with pytest.raises(UserError, match=r"data.shards: no file matches '.*a-1.tar'"):
        expand(f"{tmp_path}/a-{{0..1}}.tar")
    with pytest.raises(UserError, match=r"no file matches '.*x-\*\.tar'"):
        expand(f"{tmp_path}/a-*.tar {tmp_path}/x-*.tar")
    with pytest.raises(UserError, match=r"data.validation names no shards"):
        expand("  ", "data.validation")
    with pytest.raises(UserError, match=r"braces of '.*' do not match"):
        expand(f"{tmp_path}/a-{{0..1.tar")


def test_members_are_grouped_wherever_they_lie_and_whatever_dots_they_have(tmp_path):
    members = [
        ("deep/er/photo.v1.2.PNG", b"p"),
        ("b.txt", b"B"),
        ("deep/er/photo.v1.2.txt", b"P"),
        ("b.png", b"b"),
        (".hidden.txt", b"-"),
        ("no_extension", b"-"),
    ]
    index = index_shard(write_tar(tmp_path / "x.tar", members))
    assert index.keys == ("deep/er/photo.v1.2", "b")
    reader = ShardReader([index])
    assert reader.read(0, 0).fields == {"png": b"p", "txt": b"P"}
    assert reader.read(0, 1).fields == {"txt": b"B", "png": b"b"}
    assert reader.member(0, 1, "json") is None


def test_a_name_that_comes_twice_is_said(tmp_path, caplog):
    index = index_shard(write_tar(tmp_path / "x.tar", [("a.txt", b"1"), ("a.txt", b"22")]))
    assert ShardReader([index]).read(0, 0).fields == {"txt": b"22"}
    assert "x.tar has two members 'a.txt'" in caplog.text


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_is_read(tmp_path, format):
    name = ("n" * 90 + "/") * 1 + "\u00e9" * 20 + ("m" * 80 if format != tarfile.USTAR_FORMAT else "")
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{name}{i}.txt")
            info.size = i
            tar.addfile(info, io.BytesIO(b"abc"[:i]))
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    index = index_shard(tmp_path / "x.tar")
    assert index.keys == tuple(f"{name}{i}" for i in range(3))
    assert ShardReader([index]).read(0, 2).fields == {"txt": b"ab"}


def test_our_index_and_webdataset_read_the_same(tmp_path):
    import webdataset

    path = tmp_path / "x.tar"
    write_shard(path, [(f"k{i}", {"png": bytes([i]), "txt": b"t", "json": b"{}"}) for i in range(5)])
    index = index_shard(path)
    ours = [ShardReader([index]).read(0, i) for i in range(5)]
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [(r.key, r.fields["png"]) for r in ours] == [(s["__key__"], s["png"]) for s in theirs]


def test_a_torn_tar_gives_what_is_whole_at_any_offset(tmp_path, caplog):
    members = [member for i in range(4) for member in sample(f"k{i}", i, number=i)]
    whole = write_tar(tmp_path / "whole.tar", members)
    content = whole.read_bytes()
    index = index_shard(whole)
    assert not caplog.records
    reader = ShardReader([index])
    records = [reader.read(0, i) for i in range(4)]
    ends = [max(offset + size for offset, size in sample.values()) for sample in index.members]
    torn = tmp_path / "torn.tar"
    for cut in [*range(513, ends[-1] + 1, 203), ends[0], ends[1] + 1, ends[-1]]:
        torn.write_bytes(content[:cut])
        caplog.clear()
        found = index_shard(torn)
        got = [ShardReader([found]).read(0, i) for i in range(len(found))]
        complete = [r.fields for r, end in zip(records, ends, strict=True) if end <= cut]
        if len(got) == 0:  # with nothing to compare it to, nobody knows whether the first is complete
            complete = complete[1:]
        assert [r.fields for r in got] == complete
        assert "torn.tar is torn at byte" in caplog.text


def test_garbage_in_the_middle_of_a_tar_is_a_tear(tmp_path, caplog):
    path = write_tar(tmp_path / "x.tar", [member for i in range(4) for member in sample(f"k{i}", i)])
    offset = index_shard(path).members[2]["png"][0]
    content = bytearray(path.read_bytes())
    content[offset - 512 : offset] = b"\xff" * 512
    path.write_bytes(content)
    assert index_shard(path).keys == ("k0", "k1")
    assert "is torn at byte" in caplog.text


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b" + b"z" * 2000])
def test_what_is_no_tar_is_named(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tar is not a tar file"):
        index_shard(tmp_path / "x.tar")


def test_a_shard_that_shrinks_or_vanishes_later_makes_bad_samples(tmp_path):
    path = write_tar(tmp_path / "x.tar", [member for i in range(2) for member in sample(f"k{i}", i)])
    index = index_shard(path)
    path.write_bytes(path.read_bytes()[: index.members[1]["png"][0] + 10])
    reader = ShardReader([index])
    assert reader.read(0, 0).key == "k0"
    with pytest.raises(BadSample, match="cut short"):
        reader.read(0, 1)
    path.unlink()
    with pytest.raises(BadSample, match="cannot be read"):
        ShardReader([index]).read(0, 0)


def test_many_shards_need_few_open_files(tmp_path):
    for i in range(40):
        write_tar(tmp_path / f"{i:02d}.tar", [(f"{i}.txt", b"%d" % i)])
    indices = [index_shard(path) for path in expand(f"{tmp_path}/*.tar")]
    reader = ShardReader(indices)
    for _ in range(2):
        assert [reader.read(i, 0).fields["txt"] for i in range(40)] == [b"%d" % i for i in range(40)]
    assert len(reader._files) == 32


def test_samples_without_picture_or_caption_are_left_out_and_counted(tmp_path, caplog):
    members = [*sample("good"), ("mute.png", b"x"), ("blind.txt", b"x"), ("blank.png", b"x"), ("blank.txt", b"")]
    found = open_set(str(write_tar(tmp_path / "x.tar", members)), "data.shards", samples.fault)
    assert [shard.keys for shard in found.shards] == [("good",)]
    assert found.left_out == {"no caption": 2, "no picture": 1}
    assert "no caption (the first is 'mute' in" in caplog.text


def test_where_keeps_the_samples_whose_json_says_so(tmp_path):
    metas = [
        {"style": "flat", "n": 3},
        {"style": "noto", "n": 3, "tags": ["a", "b"]},
        {"style": "noto", "n": 4, "big": True},
        {},
    ]
    members = [member for i, meta in enumerate(metas) for member in sample(f"k{i}", i, **meta)]
    path = str(write_tar(tmp_path / "x.tar", [*members, ("odd.png", b"x"), ("odd.txt", b"x"), ("odd.json", b"[1")]))

    def keys(**where):
        found = open_set(path, "data.shards", samples.fault, where)
        assert found.filtered == 5 - len(found)
        return list(found.shards[0].keys)

    assert keys(style=["noto"]) == ["k1", "k2"]
    assert keys(style=["noto", "flat"], n=["3"]) == ["k0", "k1"]
    assert keys(tags=["b", "z"]) == ["k1"]
    assert keys(big=["true"]) == ["k2"]
    with pytest.raises(UserError, match=r"none of the 5 samples .* matches data.where=\{'style': \['x'\]\}"):
        keys(style=["x"])


def test_a_set_without_samples_is_an_error(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", b"x")])
    with pytest.raises(UserError, match=r"has no sample that can be used \(no caption: 1\)"):
        open_set(str(path), "data.shards", samples.fault)
    with pytest.raises(UserError, match="the shards are empty"):
        open_set(str(write_tar(tmp_path / "y.tar", [])), "data.shards", samples.fault)


def test_an_index_takes_few_bytes_for_a_sample():
    places = {"jpg": 60_000, "txt": 80, "json": 500}
    members = {}
    for i in range(2000):
        members[f"{i:09d}"] = {name: ((3 * i + n) * 61_440, size) for n, (name, size) in enumerate(places.items())}
    index = ShardIndex("x", OrderedDict(members))
    assert index.members == tuple(members.values())
    kept = [each for each in vars(index).values() if isinstance(each, array | bytes)]
    assert sum(memoryview(each).nbytes for each in kept) < 45 * len(index)
    odd = OrderedDict(a={"txt": (2**41 + 1, 2**33)}, b={"txt": (7, 0), "png": (512, 300)})
    assert ShardIndex("x", odd).members == tuple(odd.values())


def test_reasons_beyond_a_hundred_are_one(caplog):
    tally = Tally()
    for i in range(300):
        tally.note(f"reason {i}", "key", "shard")
    assert len(caplog.records) == 101 and tally.total == 300 and tally.counts["other reasons"] == 200


def test_the_fingerprint_names_samples_not_folders(tmp_path):
    prints = []
    for folder, keys in (("a", "xy"), ("b", "xy"), ("c", "xz")):
        (tmp_path / folder).mkdir()
        path = write_tar(tmp_path / folder / "s.tar", [member for key in keys for member in sample(key)])
        prints.append(open_set(str(path), "data.shards", samples.fault).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_written_shards_are_the_same_bytes_and_whole_or_absent(tmp_path):
    records = [("a.b", {"txt": b"1", "json": json.dumps({}).encode()}), ("\u00e9", {"txt": b"2"})]
    assert write_shard(tmp_path / "1.tar", records) == write_shard(tmp_path / "2.tar", records) == 2
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
    assert index_shard(tmp_path / "1.tar").keys == ("a.b", "\u00e9")

    def interrupted():
        yield records[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "3.tar", interrupted())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.tar", "2.tar"]
