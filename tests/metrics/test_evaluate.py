"""The commands that report figures, run as a user runs them, on a random model and toy pictures."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from ldm.config import DataConfig
from ldm.data.loader import validation_batches
from ldm.metrics.quality import psnr

from .pictures_maker import COLOURS, toy_shard

ROOT = Path(__file__).parents[2]
HELD_OUT = str(ROOT / "tests" / "fixtures" / "icons" / "val-0000.tar")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script with words; returns (exit code, what it printed, what it complained of)."""

    def call(script: str, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def toy(tmp_path: Path) -> tuple[str, Path]:
    """A shard, and a file of its concepts."""
    concepts = tmp_path / "concepts.yaml"
    concepts.write_text("".join(f"- {name}\n" for name in COLOURS))
    return toy_shard(tmp_path / "toy.tar"), concepts


def test_autoencoder_figures(command, tiny_checkpoint, tiny_model, tmp_path):
    report = tmp_path / "report.json"
    code, out, _ = command(
        "scripts/evaluate.py", "autoencoder", "--model", tiny_checkpoint, "--shards", HELD_OUT, "--output", report
    )
    assert code == 0
    assert "12 pictures of 32 px" in out and "f = 4, 4 latent channels" in out
    made = json.loads(report.read_text())
    values = []
    for batch in validation_batches(DataConfig(validation=HELD_OUT, size=32), 5):
        with torch.inference_mode():
            values.append(psnr(batch.image, tiny_model.codec.decode(tiny_model.codec.encode(batch.image))))
    assert made["figures"]["pictures"] == 12
    assert made["figures"]["psnr"] == pytest.approx(torch.cat(values).mean().item(), abs=1e-6)
    assert made["protocol"]["size"] == 32 and made["protocol"]["pictures"]["pictures"] == 12


def test_a_classifier_is_trained_and_judges_prompts(command, tiny_checkpoint, toy, tmp_path):
    shards, concepts = toy
    classifier, report, sheet = tmp_path / "classifier", tmp_path / "report.json", tmp_path / "sheet.png"
    small = ("--size", 32, "--channels", 4, "--batch", 6, "--rate", 0.01)
    code, out, _ = command(
        "tools/train_classifier.py", "--shards", shards, "--concepts", concepts, "--output", classifier, "--steps", 30,
        *small,
    )  # fmt: skip
    assert code == 0
    assert "6 pictures of 3 concepts in 2 styles: flat emoji, noto emoji" in out
    assert "left out: 3 pictures" in out

    code, out, _ = command(
        "scripts/evaluate.py", "prompts", "--model", tiny_checkpoint, "--shards", shards, "--classifier", classifier,
        "--concepts", concepts, "--styles", "noto emoji,flat emoji", "--n", 2, "--steps", 2, "--seed", 5,
        "--output", report, "--grid", sheet,
    )  # fmt: skip
    assert code == 0
    made = json.loads(report.read_text())
    assert set(made["figures"]) == {
        "drawn, noto emoji", "drawn, flat emoji", "drawn, all", "real, emojitwo (never seen)",
    }  # fmt: skip
    assert made["figures"]["drawn, all"]["pictures"] == 12
    assert made["figures"]["real, emojitwo (never seen)"]["pictures"] == 3
    assert sum(found["right"] for found in made["concepts"].values()) == round(
        12 * made["figures"]["drawn, all"]["top1"]
    )
    assert made["protocol"]["prompts"][0] == "a red heart, noto emoji"
    assert made["protocol"]["seeds"] == [5, 16]
    assert made["protocol"]["classifier"]["styles"] == ["flat emoji", "noto emoji"]
    assert "chance 33.3%" in out and "sampler dpmpp_2m" in out
    assert made["protocol"]["drawing"]["steps"] == 2 and made["protocol"]["drawing"]["first_seed"] == 5
    assert made["protocol"]["reference"]["pictures"] == 9 and len(made["protocol"]["reference"]["hash"]) == 64
    assert made["sources"] == {"reference": shards}
    assert sheet.exists()

    # The pairs of one shard, on backgrounds, whose colours are judged in place of the concepts.
    only = toy_shard(tmp_path / "only.tar", pairs=[("green apple", "noto emoji"), ("red heart", "flat emoji")])
    code, out, _ = command(
        "scripts/evaluate.py", "prompts", "--model", tiny_checkpoint, "--shards", shards, "--classifier", classifier,
        "--concepts", concepts, "--pairs", only, "--colours", "colours", "--n", 3, "--steps", 1, "--output", report,
    )  # fmt: skip
    assert code == 0
    made = json.loads(report.read_text())
    assert made["protocol"]["prompts"] == [
        "a green apple on a red background, noto emoji", "a red heart on an orange background, flat emoji",
    ]  # fmt: skip
    assert {name: found["pictures"] for name, found in made["concepts"].items()} == {"green apple": 3, "red heart": 3}
    assert set(made["figures"]) == {"drawn, noto emoji", "drawn, flat emoji", "drawn, all"}
    assert made["figures"]["drawn, all"]["pictures"] == 6
    assert "nearest of 12 background colours (chance 8.3%)" in out
    assert made["protocol"]["colours"]["light blue"] == [147, 197, 253]

    for given, complaint in (
        (("--left-out", "flat emoji"), "was trained on the style 'flat emoji'"),
        (("--seed", -5), "--seed is -5; it must be at least 0"),
        (("--n", 0), "--n is 0; it must be at least 1"),
        (("--steps", 0), "0 steps were asked for"),
        (("--pairs", only, "--styles", "emojitwo"), "--pairs shows none of the concepts in one of the styles"),
        (("--colours", concepts), "must name colours by red, green and blue"),
    ):
        code, _, err = command(
            "scripts/evaluate.py", "prompts", "--model", tiny_checkpoint, "--shards", shards,
            "--classifier", classifier, "--concepts", concepts, *given,
        )  # fmt: skip
        assert code == 1 and complaint in err and err.count("\n") == 1


def test_mistakes_end_in_one_sentence(command, toy, tmp_path):
    shards, concepts = toy
    words = ("--shards", shards, "--output", tmp_path / "x")
    for script, given, complaint in (
        ("tools/train_classifier.py", (*words, "--pictures", 3), "0 concepts have 3 pictures"),
        ("tools/train_classifier.py", (*words, "--steps", 0), "--steps is 0"),
        ("tools/train_classifier.py", (*words, "--where", "style"), "and got 'style'"),
        ("scripts/evaluate.py", ("autoencoder", *words, "--model", tmp_path / "none"), "no model"),
        ("scripts/evaluate.py", ("autoencoder", *words, "--size", -3), "--size is -3; it must be between 1 and"),
        ("scripts/evaluate.py", ("autoencoder", *words, "--size", 8), "smaller than the window of SSIM"),
        ("scripts/evaluate.py", ("autoencoder", *words, "--size", 33), "multiples of 8"),
        ("scripts/evaluate.py", ("likelihood", *words, "--seed", 10**23), f"--seed is {10**23}; it must be between 0"),
        ("scripts/evaluate.py", ("prompts", *words, "--classifier", tmp_path, "--concepts", concepts), "no classifier"),
    ):
        code, _, err = command(script, *given)
        assert code == 1
        assert err.startswith("error: ") and complaint in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()
