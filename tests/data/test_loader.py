"""Loader and validation on the fixture: the border they promise, and augmentation keyed by sample and epoch."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from ldm.config import DataConfig
from ldm.data.loader import Decoded, Loader, PictureDecode, validation_batches
from ldm.errors import UserError
from ldm.training.draws import Draws

from .shard_maker import picture, sample, write_tar

ICONS = Path(__file__).parents[1] / "fixtures" / "icons"
CONFIG = DataConfig(shards=f"{ICONS}/train-*.tar", validation=f"{ICONS}/val-*.tar", size=32, workers=0, streams=4)


def by_key(batches):
    """(key, epoch) -> (picture, caption)"""
    rows = (zip(b.key, b.epoch, b.image, b.caption, strict=True) for b in batches)
    return {(key, epoch): (image, caption) for batch in rows for key, epoch, image, caption in batch}


def test_batches_keep_the_border():
    loader = Loader(CONFIG, 12, 0, 1, 0)
    assert loader.samples_per_epoch == 48
    batches = list(islice(loader, 4))
    assert sorted(key for batch in batches for key in batch.key) == [f"train-{i // 24:04d}/{i:04d}" for i in range(48)]
    for batch in batches:
        assert len(batch) == 12 and batch.image.shape == (12, 3, 32, 32) and batch.image.dtype == torch.float32
        assert -1 <= batch.image.min() < -0.5 and 0.5 < batch.image.max() <= 1
        assert all(batch.caption) and batch.epoch == [0] * 12


def test_augmentation_depends_on_seed_key_and_epoch_alone(tmp_path):
    members = [member for i in range(12) for member in sample(f"k{i}", i, captions=["one", "two", "three"])]
    wide = DataConfig(shards=str(write_tar(tmp_path / "x.tar", members)), size=16, flip=True, crop="random")
    config = replace(wide, caption="variants", workers=0, streams=4)
    alone = by_key(islice(Loader(config, 4, 0, 1, 5), 6))
    other = replace(config, workers=1, streams=2, shuffle=3)
    shared = [batch for rank in range(2) for batch in islice(Loader(other, 12, rank, 2, 5), 2)]
    again = by_key(shared)
    assert len(alone) == 24 and alone.keys() == again.keys()
    for row in alone:
        assert torch.equal(alone[row][0], again[row][0]) and alone[row][1] == again[row][1]
    assert any(not torch.equal(alone[f"x/k{i}", 0][0], alone[f"x/k{i}", 1][0]) for i in range(12))
    assert {caption for _, caption in alone.values()} == {"one", "two", "three"}
    reseeded = by_key(islice(Loader(config, 4, 0, 1, 6), 6))
    assert any(alone[row][1] != reseeded[row][1] for row in alone)


def test_samples_of_two_shards_that_are_numbered_alike_are_not_alike(tmp_path):
    """Same keys, same pictures: crop, flip, caption and noise are drawn for each by itself, whatever the folder."""
    shards = []
    for folder, name in (("a", "0.tar"), ("a", "1.tar"), ("b", "1.tar")):
        (tmp_path / folder).mkdir(exist_ok=True)
        members = [each for i in range(16) for each in sample(f"{i:05d}", i, captions=["one", "two", "three"])]
        shards.append(str(write_tar(tmp_path / folder / name, members)))
    config = DataConfig(shards=" ".join(shards), size=16, flip=True, crop="random", caption="variants", streams=4)
    batch = next(iter(Loader(replace(config, workers=0), 48)))
    keys = [f"{name}/{i:05d}" for name in ("0", "1", "1~1") for i in range(16)]
    assert sorted(batch.key) == keys
    order = [batch.key.index(key) for key in keys]
    noise = Draws(0, 0, batch.key).normal("noise", (4,))
    assert len(noise.unique(dim=0)) == 48
    views = [(batch.caption[i], batch.image[i]) for i in order]
    for first, second in ((0, 16), (16, 32), (0, 32)):
        pairs = list(zip(views[first : first + 16], views[second : second + 16], strict=True))
        assert 3 < sum(one[0] != two[0] for one, two in pairs) < 16
        assert 3 < sum(not torch.equal(one[1], two[1]) for one, two in pairs) < 16
    mixture = replace(config, shards="", mixture={shards[0]: 1, shards[1]: 1, shards[2]: 1}, workers=0)
    assert set(next(iter(Loader(mixture, 48))).key) == set(keys)


def test_validation_is_one_plain_pass_in_order():
    config = replace(CONFIG, flip=True, crop="random", caption="variants")
    batches = list(validation_batches(config, 5))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert [key for batch in batches for key in batch.key] == [f"val-0000/{i:04d}" for i in range(48, 60)]
    plain = by_key(validation_batches(CONFIG, 12))
    assert all(torch.equal(image, plain[row][0]) for row, (image, _) in by_key(batches).items())
    assert list(validation_batches(replace(CONFIG, validation=""), 5)) == []


def test_a_filter_counts_in_the_plan():
    loader = Loader(replace(CONFIG, where={"licence": ["MIT"]}), 4, 0, 1, 0)
    assert 0 < loader.samples_per_epoch < 48
    assert f"{loader.samples_per_epoch} samples ({48 - loader.samples_per_epoch} filtered out" in loader.describe()
    with pytest.raises(UserError, match=r"matches data.where"):
        Loader(replace(CONFIG, where={"licence": ["GPL"]}), 4, 0, 1, 0)


def test_a_broken_picture_is_left_out_with_its_reason(tmp_path, caplog):
    members = [
        *sample("a", 1),
        ("broken.png", b"\x89PNG\r\n\x1a\n" + b"x" * 50),
        ("broken.txt", b"text"),
        *sample("b", 2),
    ]
    config = DataConfig(shards=str(write_tar(tmp_path / "x.tar", members)), size=8, streams=1)
    loader = Loader(config, 3, 0, 1, 0)
    batches = list(islice(loader, 2))
    assert {key for batch in batches for key in batch.key} == {"x/a", "x/b"}
    assert loader.tally.counts == {"the picture does not decode": 1}
    assert caplog.text.count("the picture does not decode (the first is 'broken' in") == 1


def test_a_label_that_the_network_does_not_know_is_left_out_with_its_reason(tmp_path, caplog):
    kinds = {"a": "cat", "b": "cow", "c": 3, "d": "cat", "e": "dog", "f": ""}
    members = [each for key, kind in kinds.items() for each in sample(key, kind=kind)]
    config = DataConfig(shards=str(write_tar(tmp_path / "x.tar", members)), size=8, streams=1, label="kind", workers=0)
    config = replace(config, validation=config.shards, bad_limit=0.6)
    loader = Loader(config, 3, decode=PictureDecode(config, ("cat", "dog")))
    batches = list(islice(loader, 2))
    assert {(key, label) for b in batches for key, label in zip(b.key, b.label, strict=True)} == {
        ("x/a", "cat"),
        ("x/d", "cat"),
        ("x/e", "dog"),
    }
    reasons = {f"its kind is '{name}', and the network's labels are cat, dog" for name in ("cow", "3")}
    assert set(loader.tally.counts) == reasons | {"no label: its json has no text or whole number in 'kind'"}
    assert caplog.text.count("its kind is 'cow'") == 1
    assert [b.label for b in validation_batches(config, 2, ("cat", "dog"))] == [["cat", "cat"], ["dog"]]
    assert {label for b in islice(Loader(config, 3), 2) for label in b.label} == {"cat", "cow", "3", "dog"}  # any
    config = replace(config, bad_limit=0.0)
    with pytest.raises(UserError, match="bad_limit"):
        list(islice(Loader(config, 3, decode=PictureDecode(config, ("cat", "dog"))), 4))


def test_pictures_need_no_captions_where_none_are_read(tmp_path):
    members = [("a.png", picture(1)), ("b.png", picture(2)), ("b.json", b'{"kind": "cat"}'), *sample("c", kind="dog")]
    shards = str(write_tar(tmp_path / "x.tar", members))
    config = DataConfig(shards=shards, validation=shards, size=8, streams=1, workers=0, caption="none")
    batch = next(iter(Loader(config, 3)))
    assert sorted(batch.key) == ["x/a", "x/b", "x/c"] and batch.caption == [""] * 3
    assert [batch.key for batch in validation_batches(config, 3)] == [["x/a", "x/b", "x/c"]]
    labelled = Loader(replace(config, label="kind", bad_limit=0.5), 2)
    assert {label for batch in islice(labelled, 3) for label in batch.label} == {"cat", "dog"}
    assert {*next(iter(Loader(replace(config, caption="txt", bad_limit=0.9), 3))).key} == {"x/c"}


def test_other_decoders_fit_in(tmp_path):
    config = DataConfig(shards=str(write_tar(tmp_path / "x.tar", sample("a"))), streams=1)
    batch = next(iter(Loader(config, 2, 0, 1, 0, decode=_blank)))
    assert batch.image.shape == (2, 3, 1, 1) and batch.caption == ["A", "A"]


def _blank(record, rng):
    return Decoded(torch.zeros(3, 1, 1), record.key.upper(), (1, 1), (0, 0))


def test_unknown_settings_are_named():
    with pytest.raises(UserError, match=r"data.caption is 'text'; it must be one of txt, variants"):
        Loader(replace(CONFIG, caption="text"), 4, 0, 1, 0)
    with pytest.raises(UserError, match=r"data.crop is 'left'"):
        Loader(replace(CONFIG, crop="left"), 4, 0, 1, 0)
    with pytest.raises(UserError, match=r"data.size is 0"):
        Loader(replace(CONFIG, size=0), 4, 0, 1, 0)
    with pytest.raises(UserError, match=r"data.shards: no file matches"):
        Loader(replace(CONFIG, shards=f"{ICONS}/train-{{0000..0002}}.tar"), 4, 0, 1, 0)
