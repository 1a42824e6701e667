"""The commands that begin with pictures, as they are used: what they write, say, make again and refuse."""

from __future__ import annotations

from ldm.script import run

import base64
import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import image_io
from ldm.checkpoints import native
from ldm.commands import files
from ldm.errors import UserError
from ldm.web.shelf import named

SCRIPTS = Path(__file__).parents[2] / "scripts"


class Commands:
    """The scripts, run in this process, on a small model: (exit code, standard output, standard error)."""

    def __init__(self, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.words = ("--model", model, "--device", "cpu", "--out", out)
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, name: str, *words: object) -> tuple[int, str, str]:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec and spec.loader
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        own = ("--steps", 2, "--cfg", 1) if "--reproduce" not in words and "--steps" not in words else ()
        self.monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, (*words, *own, *self.words))])
        self.capsys.readouterr()
        code = 0
        try:
            run(script.main)
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self.capsys.readouterr()
        return code, out, err

    def refused(self, name: str, *words: object) -> str:
        code, out, err = self(name, *words)
        assert code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
        return err


@pytest.fixture
def command(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Commands:
    return Commands(tiny_checkpoint, tmp_path / "out", monkeypatch, capsys)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def noisy(path: Path, width: int, height: int, seed: int = 0) -> np.ndarray:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return levels


CASES = {
    "img2img": ("img2img", "--strength", 0.5),
    "another size": ("img2img", "--width", 60),
    "padded": ("img2img", "--width", 46, "--height", 33),
    "mask": ("inpaint", "--mask", "MASK", "--feather", 2),
    "neighbourhood": ("inpaint", "--mask", "MASK", "--only-masked", 3, "--strength", 0.7),
    "extension": ("inpaint", "--extend", "0,8,4,0"),
    "upscale": ("upscale", "--factor", 1.5, "--seed", 4),
}


@pytest.mark.parametrize("case", CASES)
def test_each_is_made_again_from_its_file(command: Commands, tmp_path: Path, case: str) -> None:
    levels, mask = noisy(tmp_path / "a.png", 40, 32), Image.new("L", (40, 32))
    mask.paste(255, (8, 8, 20, 20))
    mask.save(tmp_path / "mask.png")
    name, *words = (tmp_path / "mask.png" if word == "MASK" else word for word in CASES[case])
    init = ("--init", tmp_path / "a.png")
    code, out, err = command(str(name), *init, "--prompt", "a cat", "--n", 2, *words)
    assert code == 0 and out.count("\n") == 2 and ("multiples of 4" in err) == (case == "padded"), err
    first = tmp_path / "out" / "00001.png"
    if "--mask" in words:
        outside = np.array(mask) == 0
        assert np.array_equal(pixels(first)[outside], levels[outside])
        within = image_io.read_metadata(first)["mask"]["png"]
        assert np.array_equal(np.array(Image.open(io.BytesIO(base64.b64decode(within)))), np.array(mask))
    told, (width, height) = image_io.read_metadata(first), Image.open(first).size
    assert [width, height] == told.get("size", [told["width"], told["height"]])
    assert ("size" in told) == (case in ("extension", "upscale"))
    code, out, err = command("img2img", "--reproduce", first, *init)
    assert code == 0 and "is not" not in err
    assert np.array_equal(pixels(tmp_path / "out" / "00002.png"), pixels(first))
    assert not np.array_equal(pixels(tmp_path / "out" / "00000.png"), pixels(first))

    assert "began with the picture a.png" in command.refused("img2img", "--reproduce", first)
    noisy(tmp_path / "a.png", 40, 32, seed=1)
    code, out, err = command("img2img", "--reproduce", first, *init)
    assert code == 0 and "a.png is not the file that the picture was made with" in err


def test_a_depth_map_is_told_to_a_network_that_takes_one(command: Commands, tmp_path: Path) -> None:
    from conftest import TINY, tiny_parts

    assert TINY.unet is not None
    config = replace(TINY, unet=replace(TINY.unet, in_channels=TINY.unet.in_channels + 1))
    native.save(tmp_path / "deep", config, tiny_parts(config))  # type: ignore[arg-type]
    noisy(tmp_path / "a.png", 32, 32)
    depth = Image.linear_gradient("L")
    for name, turned in (("near", 0), ("far", 90)):
        depth.rotate(turned).save(tmp_path / f"{name}.png")
    init, plain = ("--init", tmp_path / "a.png"), command.words
    words = (*init, "--prompt", "a cat", "--strength", 1, "--depth")
    assert "takes no depth map; leave it out" in command.refused("img2img", *words, tmp_path / "near.png")
    command.words = ("--model", tmp_path / "deep", *plain[2:])
    assert "a depth map, which img2img takes as" in command.refused("img2img", *words[:-1])
    for name in ("near", "far"):
        assert command("img2img", *words, tmp_path / f"{name}.png")[0] == 0
    first, second = (tmp_path / "out" / f"0000{i}.png" for i in range(2))
    assert not np.array_equal(pixels(first), pixels(second))
    assert "with the depth map near.png; give it as --depth" in command.refused("img2img", "--reproduce", first, *init)
    code, _, err = command("img2img", "--reproduce", first, *init, "--depth", tmp_path / "near.png")
    assert code == 0 and "is not" not in err
    assert np.array_equal(pixels(tmp_path / "out" / "00002.png"), pixels(first))
    _, _, err = command("img2img", "--reproduce", first, *init, "--depth", tmp_path / "far.png")
    assert "far.png is not the file that the picture was made with" in err
    for name in ("wide", "relief"):
        noisy(tmp_path / f"{name}.png", 64, 32, seed=3)
        Image.open(tmp_path / f"{name}.png").crop((16, 0, 48, 32)).save(tmp_path / f"{name}-middle.png")
    for end, more in (("", ("--width", 32, "--height", 32)), ("-middle", ())):
        words = ("--init", tmp_path / f"wide{end}.png", "--prompt", "a cat", "--strength", 1, *more)
        assert command("img2img", *words, "--depth", tmp_path / f"relief{end}.png")[0] == 0
    *_, cut, alone = sorted((tmp_path / "out").glob("*.png"))
    assert np.array_equal(pixels(cut), pixels(alone))  # a depth map is cut as its picture is


def test_what_is_transparent_is_drawn(command: Commands, tmp_path: Path) -> None:
    levels = noisy(tmp_path / "a.png", 32, 32)
    picture = Image.fromarray(levels).convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 16, 32, 32))
    picture.save(tmp_path / "a.png")
    init = ("--init", tmp_path / "a.png")
    assert command("inpaint", *init, "--prompt", "a cat")[0] == 0
    made = pixels(tmp_path / "out" / "00000.png")
    assert np.array_equal(made[:16], levels[:16]) and made[16:].std() > 5
    assert command("inpaint", "--reproduce", tmp_path / "out" / "00000.png", *init)[0] == 0
    assert np.array_equal(pixels(tmp_path / "out" / "00001.png"), made)


def test_hires(command: Commands, tmp_path: Path) -> None:
    words = ("--prompt", "a cat", "--hires", 1.5, "--hires-strength", 0.4)
    assert command("txt2img", *words)[0] == 0
    made = pixels(tmp_path / "out" / "00000.png")
    assert made.shape == (48, 48, 3)
    assert command("txt2img", "--reproduce", tmp_path / "out" / "00000.png")[0] == 0
    assert np.array_equal(pixels(tmp_path / "out" / "00001.png"), made)
    assert "leave --init, --mask and --depth out" in command.refused(
        "img2img", "--reproduce", tmp_path / "out" / "00000.png", "--init", tmp_path / "out" / "00001.png"
    )


def test_a_folder_is_gone_on_with(command: Commands, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name, width in (("a.png", 32), ("b.jpg", 40), ("c.png", 32)):
        noisy(photos / name, width, 32)
    words = ("--init", photos, "--prompt", "a cat", "--n", 3, "--batch-size", 2)
    code, _, err = command("img2img", *words)
    made = sorted(path.name for path in out.iterdir())
    assert (code, err) == (0, "") and made == [f"{name}-{i}.png" for name in "abc" for i in range(3)]
    before = {name: pixels(out / name) for name in made}
    (out / "b-1.png").unlink()
    code, said, err = command("img2img", *words)
    assert (code, err) == (0, "") and said.count("is there already") == 8
    assert all(np.array_equal(pixels(out / name), before[name]) for name in made)
    assert "a-0.png is there and was drawn with another begin; choose another --out" in command.refused(
        "img2img", *words, "--strength", 0.4
    )
    noisy(out / "a-0.png", 4, 4)
    assert "was not drawn by this command" in command.refused("img2img", *words)


@pytest.mark.slow
def test_the_same_pictures_by_one_process_and_by_two(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na red heart\n")
    (tmp_path / "photos").mkdir()
    for i in range(3):
        noisy(tmp_path / "photos" / f"{i}.png", 32, 32, i)
    words = {
        "txt2img": ["--from-file", str(tmp_path / "prompts.txt"), "--n", "2", "--batch-size", "2"],
        "img2img": ["--init", str(tmp_path / "photos"), "--prompt", "a cat"],
    }
    how = ["--steps", "2", "--model", str(tiny_checkpoint), "--device", "cpu"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    for name, own in words.items():
        for launch, out in (([sys.executable], "one"), (launcher, "two")):
            command = [*launch, str(SCRIPTS / f"{name}.py"), *own, *how, "--out", str(tmp_path / out / name)]
            subprocess.run(command, check=True, capture_output=True, text=True)
        made = sorted((tmp_path / "one" / name).iterdir())
        assert [path.name for path in made] == sorted(path.name for path in (tmp_path / "two" / name).iterdir())
        assert len(made) == (6 if name == "txt2img" else 3)
        for path in made:  # threads are as many as cores for one, fewer for two: sums are rounded otherwise
            one, two = (pixels(tmp_path / out / name / path.name).astype(int) for out in ("one", "two"))
            assert np.abs(one - two).max() <= 1


def test_variations_of_a_seed_and_of_a_picture(command: Commands, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cat = ("--prompt", "a cat", "--seed", 5)
    assert command("txt2img", *cat, "--out", out)[0] == 0
    assert command("variations", *cat, "--amount", 0, "--n", 2)[0] == 0
    own = pixels(out / "00000.png")
    assert all(np.array_equal(pixels(out / f"0000{i}.png"), own) for i in (1, 2)), "amount 0 is the seed's own picture"
    assert command("variations", *cat, "--amount", 0.1, "--n", 2)[0] == 0
    near = [float(np.abs(pixels(out / f"0000{i}.png") - own.astype(float)).mean()) for i in (3, 4)]
    assert command("txt2img", "--prompt", "a cat", "--seed", 6)[0] == 0
    assert min(near) > 0 and max(near) < float(np.abs(pixels(out / "00005.png") - own.astype(float)).mean())
    assert command("variations", "--reproduce", out / "00004.png")[0] == 0
    assert np.array_equal(pixels(out / "00006.png"), pixels(out / "00004.png"))
    assert command("variations", "--init", out / "00000.png", "--n", 2)[0] == 0
    records = [image_io.read_metadata(out / f"0000{i}.png") for i in (7, 8)]
    assert [record["prompt"] for record in records] == ["a cat"] * 2 and records[0]["begin"]["strength"] == 0.5
    assert "--strength is for variations of --init" in command.refused("variations", *cat, "--strength", 0.3)


def test_the_way_between_prompts_seeds_and_pictures(command: Commands, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ends = (("a cat", 3), ("a dog", 3), ("a dog", 8))
    for prompt, seed in ends:
        assert command("txt2img", "--prompt", prompt, "--seed", seed)[0] == 0
    first, last = ("--prompt", "a cat", "--prompt", "a dog"), ("--prompt", "a dog", "--prompt", "a dog")
    assert command("interpolate", *first, "--seeds", 3, "--frames", 3)[0] == 0
    assert command("interpolate", *last, "--seeds", 3, 8, "--frames", 3, "--film", "gif", "apng")[0] == 0
    same = {3: 0, 5: 1, 6: 1, 8: 2}  # frame -> the end that it is
    for frame, end in same.items():
        difference = np.abs(pixels(out / f"0000{frame}.png").astype(int) - pixels(out / f"0000{end}.png"))
        assert difference.max() <= 1, "to rounding: it is drawn in another batch"
    assert not any(np.array_equal(pixels(out / "00004.png"), pixels(out / f"0000{i}.png")) for i in (3, 5))
    for film in ("film-00006.gif", "film-00006.png"):
        with Image.open(out / film) as picture:
            assert getattr(picture, "n_frames", 1) == 3 and picture.size == (32, 32)
    assert image_io.read_metadata(out / "film-00006.png")["seeds"] == [3, 3, 3]

    for name in ("a", "b"):
        noisy(tmp_path / f"{name}.png", 32, 32, ord(name))
    init = ("--init", tmp_path / "a.png", tmp_path / "b.png")
    assert command("interpolate", *init, "--strength", 0, "--frames", 3, "--out", out)[0] == 0
    for frame, name in ((9, "a"), (11, "b")):
        assert command("img2img", "--init", tmp_path / f"{name}.png", "--prompt", "", "--strength", 0)[0] == 0
        made = sorted(out.glob("000*.png"))[-1]
        assert np.abs(pixels(made).astype(int) - pixels(out / f"{frame:05d}.png")).max() <= 1
    assert command("interpolate", *init, "--strength", 0.6, "--frames", 3)[0] == 0
    middle = sorted(out.glob("000*.png"))[-2]
    assert command("interpolate", "--reproduce", middle, *init)[0] == 0
    assert np.array_equal(pixels(sorted(out.glob("000*.png"))[-1]), pixels(middle))
    record = image_io.read_metadata(middle)
    for name, changed, words in (
        ("other", {**record["other"], "share": 5}, "a share of 5 of its second picture"),
        ("variation", [1, "b"], "the share is 'b', which is not a number"),
        ("begin", {"feather": 10**9}, "feather is 1000000000 pixels"),
    ):
        image_io.save_png(torch.zeros(3, 32, 32), tmp_path / "strange.png", {**record, name: changed})
        assert words in command.refused("interpolate", "--reproduce", tmp_path / "strange.png", *init)
    assert "began with 2 pictures, and --init names 1" in command.refused(
        "interpolate", "--reproduce", middle, "--init", tmp_path / "a.png"
    )


def test_names_of_what_is_drawn_of_a_folder() -> None:
    assert files.names([Path("x/a.png"), Path("x/b.png")], 1) == [["a.png"], ["b.png"]]
    assert files.names([Path("x/a.png"), Path("x/a.jpg")], 1) == [["a.png.png"], ["a.jpg.png"]]
    clash = [Path("a.png"), Path("a.jpg"), Path("a.png.jpg")]
    assert files.names(clash, 1) == [["00000-a.png.png"], ["00001-a.jpg.png"], ["00002-a.png.jpg.png"]]
    assert files.names([Path("x/a.png"), Path("y/a.png")], 2) == [
        ["00000-a.png-0.png", "00000-a.png-1.png"],
        ["00001-a.png-0.png", "00001-a.png-1.png"],
    ]


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    for read in (files.inits, lambda words: named(words, "LoRA")):
        with pytest.raises(UserError, match="permission"):
            read([str(tmp_path)])


# ---------------------------------------------------------------- what they refuse

WITHOUT_TORCH = """
import json, runpy, sys
sys.modules["torch"] = None  # importing it fails
for name, *words in json.loads(sys.argv[1]):
    sys.argv = [name + ".py", *words]
    try:
        runpy.run_path(SCRIPTS + "/" + name + ".py", run_name="__main__")
    except SystemExit as end:
        print("exit", end.code, flush=True)
""".replace("SCRIPTS", repr(str(SCRIPTS)))


def test_mistakes_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    noisy(tmp_path / "a.png", 32, 32)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    init = ["--init", str(tmp_path / "a.png"), "--prompt", "a cat"]
    expected = {
        "say which picture to begin with": ["img2img", "--prompt", "a cat"],
        "say what to draw": ["inpaint", *init[:2]],
        "there is no picture": ["img2img", "--init", str(tmp_path / "missing.png"), "--prompt", "a cat"],
        "text.png: the picture does not decode": ["img2img", "--init", str(tmp_path / "text.png"), "--prompt", "a"],
        "has no picture (.png": ["img2img", "--init", str(tmp_path / "empty"), "--prompt", "a cat"],
        "the strength is 2; choose it from 0": ["img2img", *init, "--strength", "2"],
        "--strength is 'half'; it must be a number": ["img2img", *init, "--strength", "half"],
        "missing_mask.png": ["inpaint", *init, "--mask", str(tmp_path / "missing_mask.png")],
        "feather is -1 pixels; choose between 0 and 16384": ["inpaint", *init, "--feather", "-1"],
        "only-masked is -3 pixels": ["inpaint", *init, "--only-masked", "-3"],
        "--extend is 'a,b'": ["inpaint", *init, "--extend", "a,b"],
        "--extend is 1,2; give pixels for left,right,top,bottom": ["inpaint", *init, "--extend", "1,2"],
        "the factor is 0.5; choose it from 1 to 16": ["upscale", *init, "--factor", "0.5"],
        "there is no way between one and itself; give another": ["interpolate", *["--prompt", "a", "--prompt", "a"]],
        "are of the second drawing; give --hires": ["txt2img", "--prompt", "a cat", "--window", "64"],
        "--hires is nan": ["txt2img", "--prompt", "a cat", "--hires", "nan"],
        "there is no way between one and itself": ["interpolate", "--prompt", "a cat"],
        "2 prompts, 3 seeds were given": [*["interpolate", "--prompt", "a", "--prompt", "b", "--seeds", "1", "2", "3"]],
        "1 prompts, 2 seeds, 1 pictures were given": ["interpolate", *init, "--seeds", "1", "2"],
        "--frames is 0; it must be at least 1": [*["interpolate", "--prompt", "a", "--prompt", "b", "--frames", "0"]],
        "there is no way between labels": [
            *["interpolate", "--prompt", "a", *["--label", "b"] * 2, "--seeds", "1", "2"]
        ],
        "a batch of 0 pictures": [*["interpolate", "--prompt", "a", "--prompt", "b", "--batch-size", "0"]],
        "1 frames were asked for": [*["interpolate", "--prompt", "a", "--prompt", "b", "--frames", "1"]],
        "--film is 'mp4'": [*["interpolate", "--prompt", "a", "--prompt", "b", "--film", "mp4"]],
        "a share of 1.5 was asked for": [*["variations", "--prompt", "a", "--amount", "1.5"]],
        "carries no settings": ["img2img", "--reproduce", str(tmp_path / "a.png"), "--init", str(tmp_path / "a.png")],
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(list(expected.values()))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "exit 1\n" * len(expected), done.stdout + done.stderr
    for words, line in zip(expected, done.stderr.splitlines(), strict=True):
        assert line.startswith("error: ") and words in line, line


def test_masks_and_pictures_that_do_not_fit(command: Commands, tmp_path: Path) -> None:
    noisy(tmp_path / "a.png", 32, 32)
    for name, size in (("black.png", (32, 32)), ("small.png", (16, 32))):
        Image.new("L", size).save(tmp_path / name)
    init = ("--init", tmp_path / "a.png", "--prompt", "a cat")
    assert "the mask is 16 x 32 pixels and the picture 32 x 32" in command.refused(
        "inpaint", *init, "--mask", tmp_path / "small.png"
    )
    assert "black everywhere" in command.refused("inpaint", *init, "--mask", tmp_path / "black.png")
    assert "no transparent parts to draw" in command.refused("inpaint", *init)
    noisy(tmp_path / "tiny.png", 4, 4)
    assert "choose one of 8 or more" in command.refused("img2img", "--init", tmp_path / "tiny.png", "--prompt", "a")
    code, _, err = command("img2img", "--init", tmp_path / "a.png", "--prompt", "a", "--width", 132, "--steps", 1)
    assert code == 0 and "drawn at 132 x 132 pixels, and the model was trained at 32" in err
