"""What the tool writes is what encoding on the fly gives; it goes on where it stopped; it mixes no two models."""

from ldm.script import run

import argparse
import runpy
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import native
from ldm.checkpoints.opening import open_checkpoint
from ldm.config import DataConfig, DiffusionTraining, EncoderConfig, LoopConfig, UNetConfig
from ldm.data.latents import LatentLoader, latent_fingerprint
from ldm.data.loader import Loader
from ldm.data.shards import expand
from ldm.errors import UserError
from ldm.training.draws import Draws
from ldm.training.stage_two import diffusion_stage

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "precompute_latents.py")
SHARDS = str(ROOT / "tests" / "fixtures" / "icons" / "train-*.tar")
DATA = DataConfig(shards=SHARDS, size=32, flip=True, caption="variants", streams=4, workers=0)


@pytest.fixture
def tool(monkeypatch, tiny_checkpoint, capsys):
    """Run the tool on the fixture; returns (exit code, what it printed, what it complained of)."""

    def call(output: Path, *words: object, stop_after: int | None = None) -> tuple[int, str, str]:
        given = ["--autoencoder", tiny_checkpoint, "--text", tiny_checkpoint, "--shards", SHARDS, "--size", 32]
        given += ["--flip", "--batch", 7, "--shard-samples", 10, "--output", output, *words]
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, given)])
        names = runpy.run_path(TOOL)
        main = names["main"]
        if stop_after is not None:
            whole, calls = names["encode_captions"], iter(range(stop_after))

            def interrupted(*arguments):
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                return whole(*arguments)

            main.__globals__["encode_captions"] = interrupted
        code = 0
        try:
            run(main)
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_cached_is_what_encoding_on_the_fly_gives(tool, tmp_path, tiny_checkpoint, tiny_model):
    code, out, _ = tool(tmp_path / "latents")
    assert code == 0
    assert f"wrote 48 samples to {tmp_path / 'latents'}" in out
    model = open_checkpoint(tiny_checkpoint)
    prints = latent_fingerprint(model, model, DATA)
    cached = LatentLoader(replace(DATA, shards=str(tmp_path / "latents")), 8, 0, 1, 3, prints)
    whole = {}
    for batch in islice(cached, 6):
        whole.update({key: (batch.moments[i], batch.context[i]) for i, key in enumerate(batch.key)})
    assert len(whole) == 48
    seen = set()
    for batch in islice(Loader(DATA, 8, 0, 1, 3), 6):  # the same draws of flip and caption
        with torch.inference_mode():
            moments = tiny_model.codec.posterior(batch.image).moments()
            context = tiny_model.text.encode(batch.caption)
        for i, key in enumerate(batch.key):
            torch.testing.assert_close(whole[key][0], moments[i], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(whole[key][1], context[i], atol=5e-3, rtol=2e-3)  # stored in float16
            seen.add(key)
    assert len(seen) == 48


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tool, tmp_path):
    assert tool(tmp_path / "whole")[0] == 0
    code, _, err = tool(tmp_path / "parts", stop_after=4)  # 28 samples encoded: two shards of 10
    assert code == 130
    assert "interrupted" in err
    assert sorted(contents(tmp_path / "parts")) == ["latents-00000.tar", "latents-00001.tar", "latents.json"]
    code, out, _ = tool(tmp_path / "parts")
    assert code == 0
    assert "going on at sample 20 of 48" in out and "wrote 28 samples" in out
    assert sorted(contents(tmp_path / "parts")) == sorted(contents(tmp_path / "whole"))
    for name in ("latents-00000.tar", "latents-00001.tar", "latents.json"):  # later batches begin elsewhere: rounding
        assert contents(tmp_path / "parts")[name] == contents(tmp_path / "whole")[name]
    assert "complete already" in tool(tmp_path / "parts")[1]


@pytest.mark.slow
def test_several_processes_make_the_same_samples_and_go_on_where_one_stopped(tool, tmp_path, tiny_checkpoint):
    assert tool(tmp_path / "one")[0] == 0
    many = tmp_path / "many"
    code, out, err = tool(many, "--part", 1, "--processes", 2)  # one of two, as if the other had been killed
    assert code == 0 and f"wrote 24 samples to {many / '.part-1-of-2'}" in out
    code, _, err = tool(many, "--processes", 3)
    assert code == 1 and "holds what 2 processes left unfinished; go on with --processes 2" in err
    assert "go on with --processes 2" in tool(many)[2]
    code, out, err = tool(many, "--processes", 2)
    assert code == 0 and f"wrote 48 samples to {many}" in out, err
    assert sorted(contents(many)) == [*(f"latents-{i:05d}.tar" for i in range(6)), "latents.json"]
    model = open_checkpoint(tiny_checkpoint)
    prints = latent_fingerprint(model, model, DATA)
    found = []
    for name in ("one", "many"):
        loader = LatentLoader(replace(DATA, shards=str(tmp_path / name), shuffle=0), 8, 0, 1, 3, prints)
        found.append([batch for batch in islice(loader, 6)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.key == theirs.key
        torch.testing.assert_close(ours.moments, theirs.moments, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.context, theirs.context, atol=5e-3, rtol=2e-3)
    assert "complete already" in tool(many, "--processes", 2)[1]
    code, _, err = tool(tmp_path / "bad", "--processes", 2, "--size", 30)
    assert (
        code == 1 and err.startswith(("error: process 0 of 2: ", "error: process 1 of 2: ")) and "multiples of 4" in err
    )


def test_latents_of_another_model_are_refused(tool, tmp_path, tiny_checkpoint):
    assert tool(tmp_path / "latents")[0] == 0
    before = contents(tmp_path / "latents")
    state = dict(open_checkpoint(tiny_checkpoint).state("autoencoder"))
    key = next(key for key in state if key.endswith("weight"))
    state[key] = state[key] + 1e-3
    config = replace(native.read_config(tiny_checkpoint), text=None, unet=None, schedule=None)
    native.save(tmp_path / "other", config, {"autoencoder": state})
    for words in (("--autoencoder", tmp_path / "other"), ("--size", 64)):
        code, _, err = tool(tmp_path / "latents", *words)
        assert code == 1
        assert "another fingerprint" in err and err.count("\n") == 1
    assert contents(tmp_path / "latents") == before


def test_settings_come_from_the_trainings_file_too(tool, monkeypatch, tmp_path, tiny_checkpoint, capsys):
    assert tool(tmp_path / "by_options", "--where", "source=noto", "--where", "mode=plain")[0] == 0
    config = tmp_path / "train.yaml"
    config.write_text(
        f"autoencoder: {tiny_checkpoint}\ntext: {tiny_checkpoint}\n"
        "data: {size: 32, flip: true, where: {source: [noto], mode: [plain]}}\n"
    )
    words = ["--config", config, f"data.shards={SHARDS}", f"latents={tmp_path / 'by_file'}"]
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, words), "--batch", "7", "--shard-samples", "10"])
    runpy.run_path(TOOL, run_name="__main__")
    assert "wrote" in capsys.readouterr().out
    assert sorted(contents(tmp_path / "by_file")) == sorted(contents(tmp_path / "by_options"))
    one = expand(str(tmp_path / "by_file" / "*.tar"))[0]
    assert one.read_bytes() == (tmp_path / "by_options" / one.name).read_bytes()


def test_mistakes_end_in_one_sentence(tool, tmp_path):
    output = tmp_path / "latents"
    for words, complaint in (
        (("--size", 30), "multiples of 4"),
        (("--where", "mode"), "and got 'mode'"),
        (("--where", "mode=cubist"), "matches"),
        (("--batch", 0), "--batch is 0"),
        (("--processes", 0), "--processes is 0"),
        (("--part", 2, "--processes", 2), "--part is 2"),
        (("--part", -1), "--part is -1"),
        (("--text", tmp_path / "none"), "none"),
        (("--shards", tmp_path / "none.tar"), "no file matches"),
        (("--precision", "int3"), "--precision is 'int3'; there are auto, fp32, fp16, bf16"),
    ):
        code, _, err = tool(output, *words)
        assert code == 1, words
        assert err.startswith("error: ") and complaint in err and err.count("\n") == 1
    assert not output.exists()


def test_latents_for_a_network_without_captions(tiny_checkpoint, tmp_path, monkeypatch):
    """A class-conditional network trains on them, with the labels of the pictures' json."""
    words = ["--autoencoder", tiny_checkpoint, "--shards", SHARDS, "--size", 32, "--output", tmp_path / "latents"]
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, words), "model.context_width=0"])
    runpy.run_path(TOOL)["main"]()
    config = DiffusionTraining(
        autoencoder=str(tiny_checkpoint),
        latents=str(tmp_path / "latents"),
        model=UNetConfig(4, 4, 32, (1,), 1, (), context_width=0, classes=2),
        encoder=EncoderConfig(labels=("noto", "fluent-flat")),
        data=replace(DATA, flip=False, label="source"),
        loop=LoopConfig(global_batch=8),
    )
    stage = diffusion_stage(config, 0, 1, torch.device("cpu"))
    batch = next(iter(stage.batches))
    assert batch.context.shape == (8, 0, 0) and set(batch.label) == {"noto", "fluent-flat"}
    ((_, loss, _),) = stage.losses(batch, Draws(0, 0, batch.key), 0, {"unet": stage.model.unet})
    assert bool(loss.isfinite())
    stage.export(tmp_path / "model", finished=True)
    config = DiffusionTraining(init=str(tmp_path / "model"), latents=config.latents, data=config.data, loop=config.loop)
    assert len(next(iter(diffusion_stage(config, 0, 1, torch.device("cpu")).batches))) == 8  # and goes on from it
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, words), "--text", str(tiny_checkpoint), "model.context_width=0"])
    with pytest.raises(UserError, match=r"with model\.context_width=0 none is used"):
        runpy.run_path(TOOL)["main"]()


def test_two_towers_and_pooled_text_are_cached_with_the_sizes(tool, tmp_path, tiny_checkpoint):
    from ldm.checkpoints.opening import open_towers
    from ldm.conditioning.encoder import Encoder

    recipe = ROOT / "configs" / "diffusion" / "sdxl_tiny.yaml"
    words = [f"text_2={tiny_checkpoint}", "data.crop=center", "data.buckets=0"]
    code, _, err = tool(tmp_path / "latents", "--config", recipe, *words)
    assert code == 0, err
    told = EncoderConfig(pooled=True, sizes=16, empty="zeros")
    model, towers = open_checkpoint(tiny_checkpoint), open_towers(tiny_checkpoint, tiny_checkpoint)
    prints = latent_fingerprint(model, towers, DATA, told)
    data = replace(DATA, shards=str(tmp_path / "latents"))
    cached = {}
    for batch in islice(LatentLoader(data, 8, 0, 1, 3, prints), 6):
        rows = zip(batch.key, batch.context, batch.pooled, batch.size.tolist(), batch.crop.tolist(), strict=True)
        cached.update({key: row for key, *row in rows})
    encoder = Encoder(towers.load_towers(), told)
    for batch in islice(Loader(DATA, 8, 0, 1, 3), 6):
        with torch.inference_mode():
            made = encoder.texts(batch.caption)
        for i, key in enumerate(batch.key):
            context, pooled, size, crop = cached[key]
            torch.testing.assert_close(context, made.context[i], atol=5e-3, rtol=2e-3)  # stored in float16
            torch.testing.assert_close(pooled, made.pooled[i], atol=5e-3, rtol=2e-3)
            assert (size, crop) == (batch.size[i].tolist(), batch.crop[i].tolist())
    for other in (latent_fingerprint(model, towers, DATA), latent_fingerprint(model, model, DATA)):
        with pytest.raises(UserError, match="stale"):
            LatentLoader(data, 8, 0, 1, 3, other)


def test_a_process_that_fails_is_heard_while_the_others_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    stopped = [threading.Event(), threading.Event()]

    class Process:
        """Of two, the first works until it is stopped."""

        count = 0

        def __init__(self, *_: object, **__: object) -> None:
            self.part, self.returncode = Process.count, Process.count
            Process.count += 1

        def communicate(self) -> tuple[str, str]:
            if self.part == 0:
                assert stopped[0].wait(20)
            return "", "error: the disk is full"

        def terminate(self) -> None:
            stopped[self.part].set()

        def wait(self) -> None:
            pass

    monkeypatch.setattr(subprocess, "Popen", Process)
    divide = runpy.run_path(TOOL)["divide"]
    with pytest.raises(UserError, match="process 1 of 2: the disk is full"):
        divide(argparse.Namespace(processes=2, device="cpu"), tmp_path)
    assert all(each.is_set() for each in stopped)
