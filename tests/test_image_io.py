"""Pictures come out as they are, with their settings inside; what is not a picture is never written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm import image_io
from ldm.errors import UserError


def test_every_8_bit_level_survives() -> None:
    levels = torch.arange(256, dtype=torch.float32).reshape(1, 16, 16).expand(3, -1, -1)
    picture = image_io.to_pil(levels / 127.5 - 1)
    assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), levels.byte())


def test_values_beyond_the_range_are_clamped_and_halves_rounded() -> None:
    image = torch.tensor([-9.0, -1.0, -1 + 0.6 / 127.5, 0.0, 1.0, 9.0]).reshape(1, 1, 6).expand(3, -1, -1)
    assert np.array(image_io.to_pil(image))[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]


def test_metadata_comes_back(tmp_path: Path) -> None:
    metadata = {"prompt": "ein Würfel 🎲\nzweite Zeile", "cfg": 7.5, "interval": [0.1, 5.0], "model": {"hash": "ab"}}
    path = tmp_path / "new folder" / "a.png"
    image_io.save_png(torch.zeros(3, 4, 6), path, metadata)
    assert image_io.read_metadata(path) == metadata
    with Image.open(path) as picture:
        assert picture.size == (6, 4) and picture.mode == "RGB"
        assert picture.text["parameters"].startswith("ein Würfel 🎲\nzweite Zeile\n")  # type: ignore[attr-defined]
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_the_readable_text_is_the_one_that_viewers_know() -> None:
    text = image_io.readable(
        {
            "prompt": "a cat",
            "negative": "a dog",
            "seed": 7,
            "cfg": 7.5,
            "eta": None,
            "width": 64,
            "height": 32,
            "model": {"name": "icons", "hash": "ab"},
            "made_on": {"device": "cpu"},
        }
    )
    last = "Seed: 7, CFG scale: 7.5, Model name: icons, Model hash: ab, Made on device: cpu, Size: 64x32"
    assert text == f"a cat\nNegative prompt: a dog\n{last}"


READERS = re.compile(r'\s*(\w[\w /-]+): ("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # how other programs read a line


def test_other_programs_take_the_readable_text_apart() -> None:
    """Whatever is in a value: each comes back whole, by its key, and nothing else does."""
    values = {
        "steps": 30,
        "sigmas": [14.0, 6.0, 0.0],
        "interval": (0.1, float("inf")),
        "model": {"name": "my, models/v2: best", "hash": "ab", "set": {"text.padding": "eot", "a:b, c": "d"}},
        "adapters": [{"kind": "lora", "path": 'a "b".safetensors', "scale": 0.8}],
        "vae": "line one\nline two\u2028three",
        "classifier": '"quoted"',
        "folder": " spaces ",
        "windows": "C:\\models",
        "unicode": "ü: 猫",
        "plain": "ü 猫",
        "options": {},
        "empty": "",
    }
    text = image_io.readable({"prompt": "a cat, red: blue", "negative": "a, b", **values})
    first, second, last = text.split("\n")
    assert (first, second) == ("a cat, red: blue", "Negative prompt: a, b") and last == text.splitlines()[-1]
    assert READERS.sub("", last) == ""
    found = {key: json.loads(value) if value[0] == '"' else value for key, value in READERS.findall(last)}
    assert found == {
        "Steps": "30",
        "Sigmas": "[14.0, 6.0, 0.0]",
        "Interval": "(0.1, inf)",
        "Model name": "my, models/v2: best",
        "Model hash": "ab",
        "Model set text padding": "eot",
        "Model set a b  c": "d",
        "Adapters": str(values["adapters"]),
        "Vae": values["vae"],
        "Classifier": '"quoted"',
        "Folder": " spaces ",
        "Windows": "C:\\models",
        "Unicode": "ü: 猫",
        "Plain": "ü 猫",
    }
    assert "Plain: ü 猫" in last and 'Unicode: "ü: 猫"' in last


def test_what_is_no_picture_is_not_written(tmp_path: Path) -> None:
    for image in (torch.zeros(1, 3, 4, 4), torch.zeros(4, 4), torch.zeros(1, 4, 4), torch.zeros(3, 4, 4).byte()):
        with pytest.raises(UserError, match=r"is not a picture \(3, H, W\)"):
            image_io.save_png(image, tmp_path / "a.png")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_picture_that_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    image = torch.zeros(3, 4, 4)
    image[1, 2, 3] = value
    with pytest.raises(UserError, match="not finite"):
        image_io.save_png(image, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(UserError):
            image_io.check_folder(folder)
        with pytest.raises(UserError):
            image_io.save_png(torch.zeros(3, 4, 4), folder / "a.png")
    image_io.check_folder(tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep" / "out").iterdir())


def png(path: Path, texts: dict[str, str]) -> Path:
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)
    return path


def test_pictures_without_our_settings(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "torn.png").write_bytes(png(tmp_path / "whole.png", {"ldm": "{}"}).read_bytes()[:60])
    Image.new("RGB", (4, 4)).save(tmp_path / "other.jpg")
    for path, words in [
        (tmp_path / "missing.png", "there is no picture"),
        (tmp_path, "a folder where a file is needed"),
        (tmp_path / "text.png", "not a PNG"),
        (tmp_path / "torn.png", "not a PNG"),
        (tmp_path / "other.jpg", "not a PNG"),
        (png(tmp_path / "plain.png", {}), "carries no settings"),
        (png(tmp_path / "list.png", {"ldm": "[1]"}), "holds a list where"),
        (png(tmp_path / "bad.png", {"ldm": "{"}), "not hold valid JSON"),
        (png(tmp_path / "deep.png", {"ldm": '{"a": ' + "[" * 100_000}), "not hold valid JSON"),
        (png(tmp_path / "nested.png", {"ldm": '{"a": ' + "[" * 50 + "]" * 50 + "}"}), "more than 32 deep"),
    ]:
        with pytest.raises(UserError) as error:
            image_io.read_metadata(path)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_metadata_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image_io.save_png(torch.zeros(3, 4, 4), path, {"cfg": 1.0, "interval": (0.0, torch.inf), "a": {"b": -torch.inf}})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    with Image.open(path) as picture:
        found = json.loads(picture.text["ldm"], parse_constant=refuse)  # type: ignore[attr-defined]
    assert found == {"cfg": 1.0, "interval": [0.0, "inf"], "a": {"b": "-inf"}}


def test_a_grid_goes_row_by_row() -> None:
    images = torch.arange(5, dtype=torch.float32).reshape(5, 1, 1, 1).expand(5, 3, 4, 6) / 10
    sheet = image_io.grid(images, columns=3, gap=2)
    assert sheet.shape == (3, 2 * 4 + 2, 3 * 6 + 2 * 2)
    assert torch.equal(sheet[:, :4, 8:14], images[1]) and torch.equal(sheet[:, 6:, :6], images[3])
    assert bool((sheet[:, :, 6:8] == 1).all()) and bool((sheet[:, 6:, 16:] == 1).all())
    assert image_io.grid(images).shape == sheet.shape
    assert image_io.grid(images[:1], columns=9).shape == (3, 4, 6)


def test_a_grid_without_columns_is_full_where_it_can_be():
    def columns(count: int) -> int:
        return (image_io.grid(torch.zeros(count, 3, 1, 1), gap=0)).shape[-1]

    assert [columns(n) for n in (1, 2, 3, 4, 6, 7, 8, 16, 32)] == [1, 2, 2, 2, 3, 3, 4, 4, 8]


def in_processes(count: int, work: Callable[[int], None]) -> None:
    """`work` in so many processes at once, each of which must come to its end."""
    read, write = os.pipe()  # which all wait at, so that none is done before the last has begun
    children = []
    for number in range(count):
        if child := os.fork():
            children.append(child)
            continue
        try:
            os.close(write)
            os.read(read, 1)
            work(number)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * count
    os.close(read)


def test_of_many_who_write_into_one_folder_none_loses_a_picture(tmp_path: Path) -> None:
    def work(number: int) -> None:
        image_io.check_folder(tmp_path)
        for picture in range(20):
            image = torch.full((3, 2, 2), (20 * number + picture) / 127.5 - 1)
            image_io.save_numbered(image, tmp_path, {"seed": 20 * number + picture})
        image_io.save_numbered(image, tmp_path, {"seed": number}, "grid-", first=0)

    in_processes(4, work)
    pictures, sheets = [sorted(tmp_path.glob(pattern)) for pattern in ("0*.png", "grid-*.png")]
    assert len(list(tmp_path.iterdir())) == 84
    assert [path.name for path in pictures] == [f"{i:05d}.png" for i in range(80)]
    assert [path.name for path in sheets] == [f"grid-{i:05d}.png" for i in range(4)]
    seeds = [image_io.read_metadata(path)["seed"] for path in pictures]
    assert [np.array(Image.open(path))[0, 0, 0] for path in pictures] == seeds
    for number in range(4):  # of each process all, in its own order
        assert [seed for seed in seeds if seed // 20 == number] == [20 * number + picture for picture in range(20)]
    assert sorted(image_io.read_metadata(path)["seed"] for path in sheets) == [0, 1, 2, 3]


def test_a_sheet_that_is_left_over_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "grid-00000.png").write_bytes(b"old")
    assert image_io.save_numbered(torch.zeros(3, 2, 2), tmp_path, prefix="grid-", first=0).name == "grid-00001.png"
    assert (tmp_path / "grid-00000.png").read_bytes() == b"old"


def ink(sheet: torch.Tensor) -> torch.Tensor:
    """Whether a pixel of a label's strip is written on."""
    return (sheet < 0).any(dim=0)


def test_a_grid_with_labels() -> None:
    images = torch.rand(3, 3, 128, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sheet = image_io.grid(images, columns=3, gap=2, labels=["a red heart, noto emoji", "", "x " * 5000])
    assert sheet.shape[2] == 3 * 160 + 4 and 128 + 4 * 11 < sheet.shape[1] < 128 + 6 * 14
    for i, image in enumerate(images):
        assert torch.equal(sheet[:, :128, i * 162 : i * 162 + 160], image)
    strip = ink(sheet[:, 128:])
    assert bool(strip[:, :160].any()) and not bool(strip[:, 160:324].any()) and bool(strip[:, 324:].any())
    assert bool((sheet <= 1).all()) and bool((sheet >= -1).all())
    with pytest.raises(UserError, match="2 labels were given for 3 pictures"):
        image_io.grid(images, labels=["a", "b"])


def test_small_pictures_have_cells_in_which_words_have_room() -> None:
    images = torch.zeros(2, 3, 32, 32)
    sheet = image_io.grid(images, columns=2, gap=0, labels=["a red heart, noto emoji", "a pizza"])
    assert (
        sheet.shape[2] == 2 * 96 and bool((sheet[:, :32, 32:64] == 0).all()) and bool((sheet[:, :32, :32] == 1).all())
    )


@pytest.mark.parametrize(
    "label",
    [
        "ein Würfel, naïve Zoë, Ångström",
        "猫と犬 кошка قطة חתול แมว",
        "👩‍👩‍👧 🎲🇩🇪 \u200d\ufe0f",
        "zero\0byte \x1b[31m tab\tline\nbreak\r\u2028",
        "half of a letter \ud800",
        "e" + "\u0301" * 500,
        "w" * 10_000,
        "a" * 60 + " " + "b" * 60,
        "\u202eright to left\u202c",
        "",
        " ",
    ],
)
def test_a_label_of_any_letters(label: str) -> None:
    sheet = image_io.grid(torch.zeros(1, 3, 64, 64), labels=[label])
    assert sheet.shape[0] == 3 and sheet.shape[2] == 96 and sheet.shape[1] < 64 + 6 * 14
    assert bool(ink(sheet[:, 64:]).any()) == bool(label.strip())


def test_accents_that_the_font_has_not_are_left_out() -> None:
    plain, accented = (image_io.grid(torch.zeros(1, 3, 64, 64), labels=[label]) for label in ("Wurfel", "Würfel"))
    assert torch.equal(plain, accented)


def test_numbers_go_on_from_the_highest(tmp_path: Path) -> None:
    assert image_io.next_number(tmp_path) == image_io.next_number(tmp_path / "missing") == 0
    for name in ("00003.png", "100000.png", "grid-200000.png", "7.txt"):
        (tmp_path / name).touch()
    assert image_io.next_number(tmp_path) == 100001
