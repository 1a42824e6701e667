"""The whole build on synthetic packages: what is in the shards, that it is the same twice, and what goes wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError

from .icon_packages import Registry, files, fill, samples

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import build_icons  # noqa: E402
from icons import bake, captions, drawings, filters, masters, rasterise, write  # noqa: E402


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Registry:
    registry = Registry(tmp_path_factory.mktemp("npm"))
    fill(registry)
    return registry


@pytest.fixture
def registry(tmp_path, packages, monkeypatch) -> Registry:
    """The same packages with a log and a network of their own."""
    fresh = Registry(tmp_path / "npm")
    fresh.root.rmdir()
    fresh.root.symlink_to(packages.root)
    monkeypatch.setenv("PATH", fresh.path())
    return fresh


@pytest.fixture(scope="module")
def built(packages, tmp_path_factory) -> Path:
    """One finished build that several tests look at; its work folder lies beside it."""
    folder = tmp_path_factory.mktemp("built") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", packages.path())
        build(folder, "--draws", "3")
    return folder


SOURCES = "noto,fluent-flat,fluent-3d,twemoji,game-icons"


def build(output: Path, *words: str, work: Path | None = None, sources: str = SOURCES) -> None:
    command = ["--output", str(output), "--work", str(work or output.parent / "work")]
    run_main(*command, "--size", "32", "--sources", sources, *words)


def run_main(*words: str) -> None:
    with mock.patch.object(sys, "argv", ["build_icons.py", "--processes", "1", *words]):
        build_icons.main()


# ---------------------------------------------------------------- the build


def test_masters_carry_picture_caption_and_all_that_is_known(built):
    found = samples(built / "masters")
    apple = next(one for one in found if one["json"]["source"] == "noto" and one["json"]["name"] == "red apple")
    assert apple["txt"] == b"a red apple, noto emoji"
    about = apple["json"]
    assert about["licence"] == "Apache-2.0" and about["author"] == "Google Inc" and about["id"] == "red-apple"
    assert about["captions"][:3] == ["a red apple, noto emoji", "noto emoji of a red apple", "red apple"]
    assert about["captions"][3] == "red apple, fruit, noto emoji"
    assert about["object"] and not about["mono"] and not about["sensitive"]
    picture = Image.open(io.BytesIO(apple["webp"]))
    assert picture.mode == "RGBA" and picture.size == (32, 32) and picture.getpixel((0, 0))[3] == 0

    names = {one["json"]["name"] for one in found}
    assert "middle finger" not in names and "facebook logo" not in names and "mystery thing" not in names
    assert {one["json"]["split"] for one in found if one["shard"].startswith("train")} == {"train"}
    assert next(one for one in found if one["json"]["name"] == "beer mug")["json"]["sensitive"]
    assert not next(one for one in found if one["json"]["name"] == "nine o'clock")["json"]["object"]


def test_the_table_and_the_attributions_name_every_source(registry, tmp_path, capsys):
    build(tmp_path / "set", sources="fluent-3d,twemoji")
    table = capsys.readouterr().out
    assert (tmp_path / "set" / "SOURCES.md").read_text() == table
    row = next(line for line in table.splitlines() if line.startswith("| fluent-3d")).split("|")
    assert [cell.strip() for cell in row[2:8]] == ["@lobehub/fluent-emoji-3d 1.1.0", "MIT", "2", "1", "0", "1"]
    text = (tmp_path / "set" / "ATTRIBUTION.md").read_text()
    assert "Twitter, Inc" in text and "https://creativecommons.org/licenses/by/4.0/" in text


def test_two_builds_give_the_same_bytes(built, registry, tmp_path):
    build(tmp_path / "set", "--draws", "3")
    assert files(tmp_path / "set") == files(built)


@pytest.mark.slow
def test_processes_do_not_matter(registry, tmp_path):
    build(tmp_path / "a", sources="noto", work=tmp_path / "w1")
    build(tmp_path / "b", "--processes", "2", sources="noto", work=tmp_path / "w2")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_of_two_alike_the_freer_licence_stays(built):
    owls = {one["json"]["source"] for one in samples(built / "masters") if one["json"]["name"] == "owl"}
    assert "noto" in owls and "twemoji" not in owls


def test_a_third_of_the_skin_tones(built):
    found = {(s["json"]["source"], s["json"]["id"]) for s in samples(built / "masters")}
    for source in ("noto", "fluent-flat"):
        for tone in captions.TONES:
            identity = f"waving-hand-{tone}-skin-tone"
            assert ((source, identity) in found) == filters.keep_tone(source, identity, 1)


def test_baked_samples_are_what_their_json_says(built):
    found = samples(built / "shards")
    kinds = [one["json"]["kind"] for one in found]
    assert set(kinds) == {"plain", "background", "pair", "tint"}
    for one in found:
        about, caption = one["json"], one["txt"].decode()
        assert Image.open(io.BytesIO(one["webp"])).mode == "RGB"
        assert about["captions"][0] == caption
        assert about["kind"] == "tint" if about["mono"] else about["kind"] != "tint"
        if about["kind"] in ("background", "tint"):
            assert f"{about['background']} background" in caption
        if about["kind"] == "pair":
            assert about["relation"] in caption and about["partner"] in caption
        if about["split"] == "train":
            assert not bake.held_out(about["name"], about["background"]) or about["kind"] != "background"
    assert kinds.count("plain") + kinds.count("tint") // 3 == len(samples(built / "masters"))


def test_held_out_prompts_are_never_drawn(built):
    prompts = set((built / "held_out_prompts.txt").read_text().splitlines())
    drawn = {one["txt"].decode() for one in samples(built / "shards")}
    assert prompts and not prompts & drawn


# ---------------------------------------------------------------- going on where it was


def test_a_second_build_fetches_renders_and_writes_nothing(registry, tmp_path, monkeypatch):
    build(tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    asked = registry.requests()
    registry.offline.touch()
    monkeypatch.setattr(rasterise, "render", lambda *_: pytest.fail("rendered again"))
    monkeypatch.setattr(write, "write_shard", lambda *_: pytest.fail("wrote again"))
    build(tmp_path / "set")
    assert registry.requests() == asked
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}


def test_an_interrupted_build_goes_on(built, registry, tmp_path, monkeypatch):
    real, calls = write.write_shard, []

    def stop_at_the_third(path, records):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(path, records)

    monkeypatch.setattr(write, "write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "set", "--draws", "3")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.tar")}
    assert len(kept) == 2
    monkeypatch.setattr(write, "write_shard", real)
    build(tmp_path / "set", "--draws", "3")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert files(tmp_path / "set") == files(built)


@pytest.mark.slow
def test_a_killed_build_goes_on(built, registry, tmp_path):
    """For real: SIGKILL as soon as the first shard is there."""
    command = [sys.executable, str(TOOLS / "build_icons.py"), "--output", str(tmp_path / "set")]
    command += ["--work", str(tmp_path / "w2"), "--size", "32", "--processes", "2", "--sources", SOURCES]
    command += ["--draws", "3"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list((tmp_path / "set").rglob("*.tar")) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "set") == files(built)


def test_shards_of_another_plan_go(registry, tmp_path):
    build(tmp_path / "set")
    build(tmp_path / "set", sources="game-icons")
    assert {one["json"]["source"] for one in samples(tmp_path / "set" / "shards")} == {"game-icons"}


# ---------------------------------------------------------------- what is not there


def test_without_network_one_sentence_names_the_packages(registry, tmp_path):
    registry.offline.touch()
    with pytest.raises(UserError) as caught:
        build(tmp_path / "set")
    sentence = str(caught.value)
    assert "@iconify-json/noto" in sentence and "cldr-annotations-full" in sentence and "\n" not in sentence
    assert "npm reaches no registry" in sentence
    assert len(registry.requests()) == 1  # it does not ask for the next when there is no way
    assert not (tmp_path / "set").exists()


def test_one_missing_package_is_named_and_the_rest_is_built(registry, tmp_path):
    with pytest.raises(UserError, match=r"the set lacks fxemoji.*@iconify-json/fxemoji \(npm says: .*404 Not Found"):
        build(tmp_path / "set", sources="noto,fxemoji")
    assert {one["json"]["source"] for one in samples(tmp_path / "set" / "masters")} == {"noto"}


def test_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not installed"):
        build(tmp_path / "set")


def test_optional_sources_drop_out_with_a_message(registry, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_icons, "SOURCES", {k: build_icons.SOURCES[k] for k in ("noto", "clipart")})
    monkeypatch.setattr("icons.fetch.shutil.which", lambda name: None if name != "npm" else str(registry.bin / "npm"))
    run_main("--output", str(tmp_path / "set"), "--work", str(tmp_path / "work"), "--size", "32")
    assert "without clipart: openclipart-svg (there is no apt-get" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--sources", "nosuch"], ["--sources", "openmoji"], ["--size", "0"], ["--draws", "0"], ["--tier", "4"]]
)
def test_wrong_words_are_refused(tmp_path, words):
    with pytest.raises(UserError):
        run_main("--output", str(tmp_path), *words)


# ---------------------------------------------------------------- a dense pack


def write_pack(folder: Path, sprites: list[masters.Master]) -> Path:
    folder.mkdir()
    lines, content = [], b""
    for one in sprites:
        lines.append(json.dumps({"offset": len(content), "length": len(one.webp), **one.meta()}))
        content += one.webp
    (folder / "masters-00.bin").write_bytes(content)
    (folder / "masters-00.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def sprite(name: str, source: str = "noto", side: int = 16, **more) -> masters.Master:
    picture = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    picture.paste((len(name) * 20 % 256, 200, 90, 255), (3, 3, side - 3, side - 3))
    out = io.BytesIO()
    picture.save(out, "WEBP", lossless=True)
    drawing = drawings.Drawing(source, name.replace(" ", "-"), name, (), True, **more)
    return masters.master(drawing, out.getvalue())


def test_a_dense_pack_becomes_shards_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    sprites = [sprite(name) for name in ("owl", "snail", "pizza")] + [sprite("anchor", "game-icons")]
    pack = write_pack(tmp_path / "pack", sprites)
    run_main("--output", str(tmp_path / "set"), "--from-masters", str(pack))
    found = samples(tmp_path / "set" / "masters")
    assert {one["webp"] for one in found} == {one.webp for one in sprites}  # the pack's bytes, not encoded again
    assert sorted(one["txt"].decode() for one in found) == sorted(one.captions[0] for one in sprites)
    kinds = {one["json"]["kind"] for one in samples(tmp_path / "set" / "shards")}
    assert kinds == {"plain", "background", "pair", "tint"}


def test_a_torn_pack_is_refused(tmp_path):
    pack = write_pack(tmp_path / "pack", [sprite("owl")])
    content = (pack / "masters-00.bin").read_bytes()
    (pack / "masters-00.bin").write_bytes(content[:-5])
    with pytest.raises(UserError, match=r"masters-00.jsonl:1"):
        list(masters.read_pack(pack))
    (pack / "masters-00.jsonl").write_text('{"offset": 0}\n')
    with pytest.raises(UserError, match="download the pack again"):
        list(masters.read_pack(pack))
    with pytest.raises(UserError, match="holds no masters"):
        list(masters.read_pack(tmp_path))


def test_near_duplicates_agree_with_all_pairs():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 255, (8, 12, 12, 3))
    pictures = np.clip(base[rng.integers(0, 8, 120)] + rng.normal(0, 1, (120, 1, 1, 3)) * rng.uniform(0, 3), 0, 255)
    kept: list[int] = []
    dropped = []
    for i, picture in enumerate(pictures):
        alike = any(np.sqrt(np.mean((picture - pictures[j]) ** 2)) < 2 for j in kept)
        (dropped if alike else kept).append(i)
    assert 10 < len(dropped) < 110
    assert filters.near_duplicates(pictures) == dropped
