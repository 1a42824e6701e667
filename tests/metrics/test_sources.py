"""Pictures from folders and shards: a set, whose figures cannot depend on the order of its files."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.transforms import square, to_tensor
from ldm.errors import UserError
from ldm.metrics.sources import of_files, open_source, read_captions, recaption
from ldm.options import where_of

from .pictures_maker import COLOURS, STYLES, toy_shard


def paint(folder, names, captions=True, side=20):
    """A folder of noise pictures, each with its own caption beside."""
    folder.mkdir()
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        if captions:
            (folder / f"{name}.txt").write_text(f" picture\n{seed} ")
    return folder


def test_the_names_of_files_do_not_matter(tmp_path):
    one = open_source(str(paint(tmp_path / "a", "pqrs")), "--pictures")
    other = open_source(str(paint(tmp_path / "b", "srqp")), "--pictures")
    assert len(one) == 4 and one.digest == other.digest
    assert [item.caption for item in one.items] == [item.caption for item in other.items]
    first, second = one.images(0, 4, 8), other.images(0, 4, 8)
    torch.testing.assert_close(torch.stack(first[1]), torch.stack(second[1]), atol=0, rtol=0)


def test_a_changed_picture_is_another_set(tmp_path):
    folder = paint(tmp_path / "a", "pq")
    before = open_source(str(folder), "--pictures").digest
    Image.new("RGB", (20, 24), "red").save(folder / "p.png")
    assert open_source(str(folder), "--pictures").digest != before


def test_pictures_are_prepared_as_in_training(tmp_path):
    source = open_source(str(paint(tmp_path / "a", "p")), "--pictures")
    _, (image,) = source.images(0, 1, 8)
    with Image.open(tmp_path / "a" / "p.png") as picture:
        torch.testing.assert_close(image, to_tensor(square(picture, 8)), atol=0, rtol=0)
    assert source.items[0].caption == "picture 0" and source.captioned


def test_what_does_not_decode_is_left_out(tmp_path):
    folder = paint(tmp_path / "a", "pqr", captions=False)
    (folder / "q.png").write_bytes(b"no picture")
    source = open_source(str(folder), "--pictures")
    rows, images = source.images(0, 9, 8)
    assert len(rows) == len(images) == 2 and not source.captioned
    assert {source.items[row].place.stem for row in rows} == {"p", "r"}


def test_a_caption_that_cannot_be_read_stops_nothing(tmp_path, caplog):
    folder = paint(tmp_path / "a", "pqrstu")
    (folder / "p.txt").write_bytes("gr\u00fcn".encode("latin-1"))
    (folder / "q.txt").unlink()
    (folder / "q.json").write_text("{")
    (folder / "r.txt").unlink()
    (folder / "r.txt").mkdir()
    (folder / "s.txt").rename(folder / "S.TXT")
    (folder / "t.txt").rename(folder / "t.caption")
    (folder / "u.txt").unlink()
    (folder / "u.json").write_text('["one", "two"]')
    found = {item.place.stem: item.caption for item in open_source(str(folder), "--pictures").items}
    assert found == {"p": "", "q": "", "r": "", "s": "picture 3", "t": "picture 4", "u": "one"}
    assert "1 captions of" in caplog.text and "not used: the caption is not UTF-8" in caplog.text


def test_hidden_copies_are_no_pictures_and_what_cannot_be_read_is_left_out(tmp_path, caplog):
    folder = paint(tmp_path / "a", "pq")
    for hidden in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        paint(folder / hidden, "z")
    (folder / "._p.png").write_bytes(b"\0")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "round.png").symlink_to("round.png")
    (folder / "again").symlink_to(folder)
    (folder / "r.bmp").write_bytes(b"BM")
    source = open_source(str(folder), "--pictures")
    assert [item.place.name for item in sorted(source.items, key=lambda item: item.place)] == ["p.png", "q.png"]
    for words in ("it is hidden", "format is not read", "it cannot be read", "a link to a folder that is read already"):
        assert words in caplog.text


def test_shards_with_fields(tmp_path):
    shard = toy_shard(tmp_path / "toy.tar")
    everything = open_source(shard, "--reference")
    some = open_source(shard, "--reference", {"style": ["emojitwo"]})
    assert (len(everything), len(some)) == (9, 3)
    assert {item.caption for item in some.items} == {f"a {name}, emojitwo" for name in COLOURS}
    assert some.protocol() == {"pictures": 3, "hash": some.digest, "where": {"style": ["emojitwo"]}}
    rows, images = everything.images(2, 5, 32)
    assert rows == [2, 3, 4] and images[0].shape == (3, 32, 32)


def test_captions_keep_their_own_order(tmp_path):
    shard = toy_shard(tmp_path / "toy.tar")
    assert read_captions(shard, {"style": [STYLES[0]]}) == tuple(f"a {name}, {STYLES[0]}" for name in COLOURS)
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_captions(str(tmp_path / "p.txt")) == ("one", "two")


def test_files_that_ask_for_more_than_captions_are_refused(tmp_path):
    for name, text in (("p.csv", "prompt,negative\none,bad\n"), ("q.jsonl", '{"prompt": "one", "seed": 7}\n')):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="seeds or negative prompts of its own"):
            read_captions(str(tmp_path / name))
    (tmp_path / "r.csv").write_text("prompt\none\ntwo\n")
    assert read_captions(str(tmp_path / "r.csv")) == ("one", "two")


def test_pictures_without_a_caption_are_told(tmp_path, caplog):
    folder = paint(tmp_path / "a", "pqr")
    (folder / "q.txt").unlink()
    assert read_captions(str(folder)) == ("picture 0", "picture 2")
    assert "1 of the 3 pictures" in caplog.text and "have no caption" in caplog.text


def test_the_choice_of_a_training_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data:\n  where:\n    style: [emojitwo]\n    name: [red heart, blue fish]\n")
    wanted = {"mode": ["plain"], "style": ["emojitwo"], "name": ["red heart", "blue fish"]}
    assert where_of(["mode=plain", f"@{recipe}"]) == wanted
    assert len(open_source(toy_shard(tmp_path / "toy.tar"), "--reference", wanted)) == 2
    with pytest.raises(UserError, match="there is no file of settings"):
        where_of([f"@{tmp_path / 'none.yaml'}"])


def test_captions_given_apart_go_to_the_pictures_by_name(tmp_path):
    folder = paint(tmp_path / "a", "qp", captions=False)
    source = recaption(open_source(str(folder), "--pictures"), ["first", "second"])
    assert {item.place.stem: item.caption for item in source.items} == {"p": "first", "q": "second"}
    with pytest.raises(UserError, match="1 captions for the 2 pictures"):
        recaption(source, ["one"])


def test_mistakes(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--reference: the folder .* has no pictures"):
        open_source(str(tmp_path / "empty"), "--reference")
    (tmp_path / "empty" / "a.bmp").touch()
    with pytest.raises(UserError, match=r"has no pictures .*; left out, 1: their format is not read"):
        open_source(str(tmp_path / "empty"), "--reference")
    with pytest.raises(UserError, match="--reference: no file matches"):
        open_source(str(tmp_path / "none"), "--reference")
    with pytest.raises(UserError, match="give shards to choose by field"):
        open_source(str(tmp_path / "empty"), "--reference", {"style": ["x"]})
    with pytest.raises(UserError, match="no such file"):
        of_files("x", [tmp_path / "none.png"], [""])
