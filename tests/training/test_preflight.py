"""What a run will need is asked for before its first step, and what fails all the same never costs the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm.config import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    ClipTraining,
    DiffusionLossConfig,
    DiffusionTraining,
    EmbeddingTraining,
    FiguresConfig,
    ImageTowerConfig,
    LoraConfig,
    OptimizerConfig,
    SampleConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
)
from ldm.errors import UserError
from ldm.training.clip import ClipStage
from ldm.training.embedding import embedding_stage
from ldm.training.loop import prepare_output
from ldm.training.stage_one import AutoencoderStage
from ldm.training.stage_two import diffusion_stage

from .test_scripts import fails
from .test_stage_two import pixels, tower  # noqa: F401 (fixtures)
from .toys import AUTOENCODER, CPU, DATA, LOOP, PIXELS, SHIPPED_SIZE, ToyStage, log_of, run


def opens_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("loader", "latents", "shards"):
        monkeypatch.setattr(f"ldm.data.{room}.open_set", lambda *a: pytest.fail("shards were opened"))
    monkeypatch.setattr("ldm.data.loader.open_data", lambda *a: pytest.fail("shards were opened"))
    monkeypatch.setattr("ldm.training.clip.open_data", lambda *a: pytest.fail("all captions were read"))


# ---------------------------------------------------------------- settings that cannot work


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"model": AutoencoderConfig(channels=33)},
            r"model\.channels makes a layer of 33 channels, which the 8 groups",
        ),
        (
            {"model": AutoencoderConfig(channels=36, multipliers=(1, 3, 4), blocks=0)},
            r"model\.blocks must be at least 1",
        ),
        (
            {"model": AutoencoderConfig(attention_levels=(4,))},
            r"model\.attention_levels has 4; there are levels 0 to 3",
        ),
        ({"model": AutoencoderConfig(multipliers=())}, r"model\.multipliers must be a list with an entry"),
        ({"model": AutoencoderConfig(in_channels=4)}, r"model\.in_channels is 4, and pictures have 3"),
        ({"model": AutoencoderConfig(scale=(float("nan"),))}, r"model\.scale must be above 0, not nan"),
        ({"loss": replace(AUTOENCODER.loss, discriminator_channels=33)}, r"loss\.discriminator_channels makes a layer"),
        ({"loss": replace(AUTOENCODER.loss, discriminator_layers=4)}, r"16x16 pixels are too small for 4 layers"),
        ({"loss": replace(AUTOENCODER.loss, guard=0.5)}, r"loss\.guard is a factor above 1"),
        ({"loss": AutoencoderLossConfig(perceptual=0.0, kl=-1.0)}, r"loss\.kl must be at least 0"),
        ({"data": replace(DATA, size=17)}, r"data\.size is 17, and sides must be multiples of 2, .* try 16 or 18"),
        ({"data": replace(DATA, size=18, buckets=9)}, r"data\.buckets is 9, and sides must be multiples of 2"),
        ({"data": replace(DATA, streams=3)}, "the global batch 8 is not a multiple of data.streams=3"),
        ({"data": replace(DATA, workers=3)}, "data.streams=4 is not a multiple of 1 processes x 3 workers"),
        ({"loop": replace(LOOP, micro_batch=3)}, "loop.global_batch=8 is not 1 processes times a multiple"),
        ({"model": AutoencoderConfig(scale=(2.0,))}, r"model\.shift and model\.scale are measured"),
        ({"model": AutoencoderConfig(channels=2**70)}, r"model\.channels must be at most 9223372036854775807"),
        ({"loss": AutoencoderLossConfig(l1=0.0, perceptual=0.0)}, "so no loss asks for the picture"),
        ({"scale_samples": 0}, "scale_samples must be at least 1"),
    ],
)
def test_stage_one_refuses_before_it_opens_a_shard(change: dict[str, Any], said: str, monkeypatch) -> None:
    opens_no_shard(monkeypatch)
    with pytest.raises(UserError, match=said):
        AutoencoderStage(replace(AUTOENCODER, **change), 0, 1, CPU)


def unet(**changes: Any) -> dict[str, Any]:
    return {"model": replace(PIXELS.model, **changes)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unet(channels=33), r"model\.channels is 33; choose an even number"),
        (unet(heads=7), r"model\.heads 7 does not divide the width 32 of a level"),
        (unet(heads=0), r"model\.heads is 0 and model\.head_width 0; set one of the two, and leave the other at 0"),
        (unet(heads=2, head_width=16), r"model\.heads is 2 and model\.head_width 16; set one of the two"),
        (unet(attention_levels=(2,)), r"model\.attention_levels has 2; there are levels 0 to 1"),
        (unet(attention_levels=(-1,)), r"model\.attention_levels must be at least 0, not -1"),
        (unet(multipliers=()), r"model\.multipliers must be a list with an entry"),
        (unet(blocks=600), r"this run describes a model with unet levels x blocks 1,202"),
        (unet(context_width=0), r"text names a text tower, and with model\.context_width=0 none is used"),
        ({"schedule": ScheduleConfig(beta_start=0.5, beta_end=0.1)}, r"choose 0 < beta_start <= beta_end"),
        ({"schedule": ScheduleConfig(steps=10**7)}, r"this run describes a model with schedule\.steps 10,000,000"),
        (
            {"schedule": ScheduleConfig(sigma_max=50.0)},
            r"schedule\.sigma_max is 50, and schedule\.kind=scaled_linear has",
        ),
        ({"schedule": ScheduleConfig("cosine", beta_end=0.02)}, r"but linear and scaled_linear; leave it out"),
        ({"lora": LoraConfig(alpha=8.0)}, r"lora\.rank is 0, which trains the weights themselves"),
        ({"loss": DiffusionLossConfig(offset_noise=float("nan"))}, r"loss\.offset_noise must be at least 0, not nan"),
    ],
)
def test_stage_two_refuses_before_it_opens_a_shard(change, said, pixels, monkeypatch) -> None:  # noqa: F811
    opens_no_shard(monkeypatch)
    with pytest.raises(UserError, match=said):
        diffusion_stage(replace(pixels, **change), 0, 1, CPU)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": TextConfig(width=32, heads=5, layers=1)}, "text width 32 is not divisible by 5 heads"),
        ({"model": TextConfig(context_length=2)}, "a context length of 2 has no room for a word"),
        ({"image_tower": ImageTowerConfig(size=16, patch=3)}, r"image_tower\.size=16 is not a multiple"),
        (
            {"image_tower": ImageTowerConfig(size=16, heads=5)},
            r"image_tower\.heads=5 does not divide image_tower\.width",
        ),
        ({"model": TextConfig(width=32, heads=2, embed_dim=0)}, r"model\.embed_dim is 0, and pictures and captions"),
        ({"image_tower": ImageTowerConfig(size=16, heads=-1)}, r"image_tower\.heads must be at least 1"),
        ({"data": replace(DATA, crop="centre")}, r"data\.crop must be one of center, random"),
    ],
)
def test_clip_refuses_before_it_reads_all_captions(change, said, monkeypatch) -> None:
    opens_no_shard(monkeypatch)
    config = ClipTraining(image_tower=ImageTowerConfig(size=16), data=DATA, loop=LOOP)
    with pytest.raises(UserError, match=said):
        ClipStage(replace(config, **change), 0, 1, CPU)


def test_an_architecture_s_numbers_are_not_contradicted(monkeypatch) -> None:
    opens_no_shard(monkeypatch)
    config = ClipTraining(image_tower=ImageTowerConfig(size=16), data=DATA, loop=LOOP)
    config = replace(config, model=TextConfig(arch="ViT-B-32", width=64))
    with pytest.raises(UserError, match=r"model\.width is 64, and that of ViT-B-32 is 512; leave one of the two out"):
        ClipStage(config, 0, 1, CPU, said={"model.width", "model.arch"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.rate=nan"], "optimizer.rate must be above 0, not nan"),
        (["optimizer.betas=[2,3]"], "optimizer.betas must be at least 0 and below 1, not 2.0"),
        (["loop.seed=99999999999999999999"], "loop.seed must be at least 0 and at most"),
        (["model.channels=33", "model.in_channels=3"], "model.channels makes a layer of 33 channels"),
    ],
)
def test_in_the_script_it_is_one_line(words, said, tmp_path, monkeypatch, capsys) -> None:
    assert said in fails("autoencoder", [*words, f"output={tmp_path}/run"], monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- a training that goes on from a model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": UNetConfig(channels=128)}, r"model\.channels is 128, and that of the model .* is 64; leave it out"),
        ({"model": UNetConfig(dropout=0.1)}, r"model\.dropout is 0\.1, .* say init_set=\[unet\.dropout=0\.1\]"),
        (
            {"schedule": ScheduleConfig(kind="cosine")},
            r"schedule\.kind is cosine, .* init_set=\[schedule\.kind=cosine\]",
        ),
        ({"schedule": ScheduleConfig(steps=500)}, r"schedule\.steps is 500, and that of the model .* is 1000"),
        ({"sigma_data": 0.5}, r"sigma_data is 0\.5, and that of the model .* is 1\.0"),
        ({"learned_variance": True}, r"learned_variance is True, and that of the model .* is False"),
        ({"parameterization": "eps"}, r"parameterization is eps, and that of the model .* is v"),
    ],
)
def test_init_says_what_the_model_is_and_is_not_contradicted(change, said) -> None:
    with pytest.raises(UserError, match=said):
        diffusion_stage(
            DiffusionTraining(init="icons", data=replace(DATA, size=SHIPPED_SIZE), loop=LOOP, **change), 0, 1, CPU
        )


def test_what_is_written_out_counts_even_where_it_is_the_default() -> None:
    config = DiffusionTraining(init="icons", data=replace(DATA, size=SHIPPED_SIZE), loop=LOOP)
    with pytest.raises(UserError, match=r"model\.channels is 320, and that of the model icons is 64"):
        diffusion_stage(config, 0, 1, CPU, said={"model.channels"})
    with pytest.raises(UserError, match=r"model\.channels is 320"):
        diffusion_stage(replace(config, model=UNetConfig(heads=0, head_width=32)), 0, 1, CPU, {"model.channels"})


def test_what_agrees_passes(tiny_checkpoint: Path) -> None:
    config = DiffusionTraining(init=str(tiny_checkpoint), data=replace(DATA, size=32), loop=LOOP)
    stage = diffusion_stage(config, 0, 1, CPU)
    again = replace(config, model=stage.model.config.unet, schedule=stage.model.config.schedule, parameterization="v")
    said = {"model.channels", "model.heads", "schedule.kind", "parameterization", "sigma_data"}
    assert diffusion_stage(again, 0, 1, CPU, said).model.config == stage.model.config


def test_a_loss_written_out_goes_before_the_model_s_own_even_where_it_is_the_default(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    own = DiffusionLossConfig(weight="min_snr")
    loop = replace(LOOP, steps=1, ema=0.0)
    config = DiffusionTraining(init=str(tiny_checkpoint), data=replace(DATA, size=32), loop=loop, loss=own)
    run(diffusion_stage(config, 0, 1, CPU), loop, tmp_path, config)
    further = replace(config, init=str(tmp_path), loss=DiffusionLossConfig())
    assert diffusion_stage(further, 0, 1, CPU).course.loss == own
    assert diffusion_stage(further, 0, 1, CPU, {"loss.weight"}).course.loss == DiffusionLossConfig()


# ---------------------------------------------------------------- what the end needs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sample": SampleConfig(("a heart",), cfg=float("nan"))}, r"sample\.cfg must be a finite number, not nan"),
        ({"sample": SampleConfig(("a heart",), steps=0)}, r"sample\.steps must be at least 1, not 0"),
        ({"sample": SampleConfig(("a \ud800",))}, r"pictures of sample\.prompts .* is not Unicode text"),
        ({"loop": replace(LOOP, seed=-1)}, r"loop\.seed must be at least 0"),
        (
            {"loop": replace(LOOP, seed=2**63 - 1), "sample": SampleConfig(("a", "b"))},
            r"sample\.prompts .* seed 92233720",
        ),
        ({"data": replace(PIXELS.data, validation="nowhere-*.tar")}, r"nowhere-\*\.tar"),
        ({"data": replace(PIXELS.data, where={"style": ["none"]})}, r"matches data\.where"),
        ({"figures": FiguresConfig(pictures=4, reference="nowhere.tar")}, r"nowhere\.tar"),
        ({"figures": FiguresConfig(pictures=2)}, r"figures of figures\.pictures=2 cannot be told: 5 neighbours need"),
        ({"figures": FiguresConfig(reference="a.tar")}, r"figures\.pictures is 0, which measures nothing"),
        ({"figures": FiguresConfig(pictures=4, space="my-space")}, "there is no feature space 'my-space'"),
        (
            {"figures": FiguresConfig(pictures=4), "data": replace(PIXELS.data, validation="")},
            r"set figures\.reference",
        ),
    ],
)
def test_what_the_end_of_a_run_needs_is_asked_for_at_its_start(change, said, pixels) -> None:  # noqa: F811
    with pytest.raises(UserError, match=said):
        diffusion_stage(replace(pixels, **change), 0, 1, CPU)


def test_held_out_pictures_are_asked_for_at_the_start_of_every_training(tiny_checkpoint: Path) -> None:
    data = replace(DATA, validation="nowhere-*.tar")
    towers = replace(ClipTraining(), image_tower=ImageTowerConfig(size=16), loop=LOOP)
    trainings: list[Callable[[], object]] = [
        lambda: AutoencoderStage(replace(AUTOENCODER, data=data), 0, 1, CPU),
        lambda: ClipStage(replace(towers, data=data), 0, 1, CPU),
    ]
    for training in trainings:
        with pytest.raises(UserError, match=r"data\.validation: no file matches .nowhere"):
            training()
    word = EmbeddingTraining(init=str(tiny_checkpoint), data=replace(data, size=32), loop=LOOP)
    said = "\n".join(embedding_stage(word, 0, 1, CPU).describe())
    assert "data.validation is not looked at" in said
    with pytest.raises(UserError, match=r"loss\.caption_dropout would drop the word"):
        embedding_stage(replace(word, loss=DiffusionLossConfig(caption_dropout=0.5)), 0, 1, CPU)


def test_settings_that_others_leave_without_effect_are_told_in_the_plan(pixels) -> None:  # noqa: F811
    changes = [
        ({"sigma_data": 2.0}, "sigma_data has no effect, for the parameterization is v"),
        (
            {"loss": DiffusionLossConfig(min_snr_gamma=3.0)},
            "loss.min_snr_gamma has no effect, for loss.weight is uniform",
        ),
        ({"data": replace(pixels.data, bucket_aspect=3.0)}, "data.bucket_aspect has no effect, for data.buckets is 0"),
        ({"optimizer": OptimizerConfig(final_rate=1e-5)}, "optimizer.final_rate has no effect, for optimizer.law is"),
        ({"optimizer": OptimizerConfig(warmup=10**6)}, "optimizer.rate is not reached, for optimizer.warmup is longer"),
    ]
    for change, said in changes:
        notices = diffusion_stage(replace(pixels, **change), 0, 1, CPU).notices
        assert [notice for notice in notices if said in notice], (said, notices)
    read = {
        "parameterization": "edm",
        "sigma_data": 2.0,
        "loss": DiffusionLossConfig("min_snr", min_snr_gamma=3.0),
        "optimizer": OptimizerConfig(law="cosine", final_rate=1e-5),
    }
    told = " ".join(diffusion_stage(replace(pixels, **read), 0, 1, CPU).notices)
    assert "no effect" not in told and "not reached" not in told


def test_prompts_that_will_not_be_drawn_or_not_to_their_end_are_told_in_the_plan(pixels) -> None:  # noqa: F811
    plain = replace(pixels, text="", model=replace(pixels.model, context_width=0), sample=SampleConfig(("a heart",)))
    assert any("are not drawn" in line for line in diffusion_stage(plain, 0, 1, CPU).describe())
    long = replace(pixels, sample=SampleConfig((" ".join(["heart"] * 40),)))
    assert any("longer than the text tower reads" in line for line in diffusion_stage(long, 0, 1, CPU).describe())


@pytest.mark.parametrize("name", ["file", "file/run", "link"])
def test_an_output_that_can_be_no_folder(name, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"cannot be a folder, since .* is a file; choose another output"):
        prepare_output(str(tmp_path / name), "")


def test_an_output_that_may_not_be_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ldm.training.preflight.os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=rf"cannot be written: permission denied in {tmp_path}"):
        prepare_output(str(tmp_path / "deep" / "run"), "")


# ---------------------------------------------------------------- what fails all the same


class Failing(ToyStage):
    """Its figures and pictures fail, each time in another way."""

    errors: tuple[Exception, ...] = (UserError("the store is gone"), RuntimeError("out of memory\nand more"))

    def validate(self) -> dict[str, float]:
        self._note("validate", -1)
        raise self.errors[len(self.seen) % 2]

    def draw(self, output: Path, step: int) -> None:
        self._note("draw", step)
        raise self.errors[len(self.seen) % 2]

    def export(self, output: Path, finished: bool) -> None:
        super().export(output, finished)
        (output / "model.json").write_text("{}")


def test_a_failed_picture_or_figure_never_costs_the_run_or_its_model(tmp_path: Path, capsys) -> None:
    loop = replace(LOOP, validate_every=2, sample_every=3)
    stage = Failing(loop)
    run(stage, loop, tmp_path)
    assert [what for what, *_ in stage.seen] == ["validate", "draw", "validate", "validate", "draw", "export", "draw"]
    assert (tmp_path / "model.json").exists()
    out, err = capsys.readouterr()
    assert "finished at step 6" in out
    told = [line for line in err.splitlines() if line.startswith("warning: no ")]
    assert len(told) == 6 and told[0] == (
        "warning: no figures of step 2, and the run goes on: RuntimeError: out of memory"
    )
    assert told[1] == "warning: no pictures of step 3, and the run goes on: the store is gone"


def test_a_run_whose_pictures_fail_in_the_end_leaves_its_model(pixels, tmp_path: Path, monkeypatch, capsys) -> None:  # noqa: F811
    """Here because the disk does not take them: a folder's name is taken."""
    config = replace(pixels, loop=replace(LOOP, steps=1), sample=SampleConfig(("a heart",), steps=1))
    (tmp_path / "samples").write_text("")
    run(diffusion_stage(config, 0, 1, CPU), config.loop, tmp_path, config)
    assert json.loads((tmp_path / "model.json").read_text())["format"] == "ldm-1"
    out, err = capsys.readouterr()
    assert "finished at step 1" in out and "warning: no pictures of step 1, and the run goes on: " in err


def test_the_first_step_has_a_line_of_the_log_at_once(tmp_path: Path, capsys) -> None:
    loop = replace(LOOP, log_every=4)
    said: list[str] = []
    stage = ToyStage(loop, before=lambda step: said.append(capsys.readouterr().out) if step == 1 else None)
    run(stage, loop, tmp_path)
    assert "toy         rows" in said[0] and "step       1  loss" in said[0]
    assert [line["step"] for line in log_of(tmp_path) if "loss" in line] == [1, 4, 6]


@pytest.mark.parametrize("stage", [AutoencoderStage, ClipStage])
def test_a_label_is_refused_where_nothing_reads_it(stage: Callable[..., object]) -> None:
    config = AUTOENCODER if stage is AutoencoderStage else ClipTraining(data=DATA)
    with pytest.raises(UserError, match=r"data\.label=source is for a network with classes"):
        stage(replace(config, data=replace(config.data, label="source")), 0, 1, CPU)


def test_memory_that_does_not_suffice_is_told_with_what_to_lower(tmp_path: Path) -> None:
    def much(step: int) -> None:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1e12 bytes"
        )

    with pytest.raises(
        UserError, match=r"the memory of cpu does not suffice for a micro-batch of 8; lower loop\.micro_b"
    ):
        run(ToyStage(LOOP, before=much), LOOP, tmp_path)


def test_clip_is_not_trained_without_captions() -> None:
    with pytest.raises(UserError, match="CLIP is trained on captions"):
        ClipStage(ClipTraining(data=replace(DATA, caption="none")), 0, 1, CPU)
