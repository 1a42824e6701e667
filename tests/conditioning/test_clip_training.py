"""The contrastive stage: which tokens own a row, what retrieval counts, and a whole small run."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ldm import config as settings
from ldm.conditioning.clip import END, START, clip_tokenizer
from ldm.conditioning.image_tower import load_image_tower
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.config import ClipTraining, DataConfig, ImageTowerConfig, LoopConfig, OptimizerConfig, TextConfig
from ldm.errors import UserError
from ldm.training.clip import MAX_LOGIT_SCALE, ClipStage, ClipTowers, retrieval, used_words
from ldm.training.draws import Draws

ROOT = Path(__file__).parents[2]
ICONS = ROOT / "tests" / "fixtures" / "icons"
TEXT = TextConfig(context_length=12, width=32, heads=2, layers=2, embed_dim=24)
TRAINING = ClipTraining(
    model=TEXT,
    image_tower=ImageTowerConfig(size=32, patch=8, width=32, layers=1, heads=2),
    data=DataConfig(
        shards=f"{ICONS}/train-*.tar",
        validation=f"{ICONS}/val-*.tar",
        size=32,
        streams=4,
        workers=0,
        caption="variants",
    ),
    optimizer=OptimizerConfig(rate=2e-3, warmup=2),
    loop=LoopConfig(steps=12, global_batch=16, ema=0.5, log_every=4, validate_every=12, save_every=100),
)


def stage(config: ClipTraining = TRAINING) -> ClipStage:
    return ClipStage(config, 0, 1, torch.device("cpu"))


# ---------------------------------------------------------------- token rows


def shards(folder: Path, samples: list[list[dict | str]]) -> str:
    """One shard for each list; a sample is its json, or the text of its .txt. Pictures are never opened here."""
    for number, content in enumerate(samples):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for key, sample in enumerate(content):
                text = isinstance(sample, str)
                members = {"png": b"x", "txt" if text else "json": (sample if text else json.dumps(sample)).encode()}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / "*.tar")


def pieces(text: str) -> set[int]:
    return set(clip_tokenizer().encode(text))


def test_rows_are_those_of_the_captions(tmp_path: Path):
    samples: list[list[dict | str]] = [
        ["a red heart"],
        [{"caption": "a kite", "captions": ["kite, toy", "blue kite"]}],
    ]
    data = DataConfig(shards=shards(tmp_path, samples), caption="variants")
    found = used_words(data, TEXT)
    assert set(found.token_ids) == {0, START, END} | pieces("a red heart kite , toy blue")
    assert list(found.token_ids) == sorted(found.token_ids)
    assert (found.captions, found.cut) == (4, 0)
    (tmp_path / "turned").mkdir()
    turned = dataclasses.replace(data, shards=shards(tmp_path / "turned", samples[::-1]))
    assert used_words(turned, TEXT) == found


def test_rows_follow_what_training_shows(tmp_path: Path):
    """Captions that are not drawn, samples that are filtered out and words that are cut get no row."""
    long = "red " * 12 + "zebra"
    meta = {"caption": "a kite", "captions": ["blue kite"], "style": "flat"}
    pattern = shards(tmp_path, [[meta, {"caption": "a whale", "style": "glossy"}, {"caption": long, "style": "flat"}]])
    found = used_words(DataConfig(shards=pattern, caption="txt", where={"style": ["flat"]}), TEXT)
    assert set(found.token_ids) == {0, START, END} | pieces("a kite red")
    assert (found.captions, found.cut) == (2, 1)
    padded = used_words(DataConfig(shards=pattern, caption="txt"), dataclasses.replace(TEXT, padding="eot"))
    assert 0 not in padded.token_ids


def test_rows_are_of_all_that_the_settings_let_training_read(tmp_path: Path, monkeypatch):
    """Commands, mixtures, and a shard that is gone when its captions are read: all as the loader has it."""
    shards(tmp_path, [["a red heart"], ["a kite"], ["a whale"]])
    command = DataConfig(shards=f"pipe:cat {tmp_path}/{{0..1}}.tar", cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"allow_pipe=true"):
        used_words(command, TEXT)
    command = dataclasses.replace(command, allow_pipe=True, bad_limit=0.5)
    assert set(used_words(command, TEXT).token_ids) == {0, START, END} | pieces("a red heart kite")
    mixture = DataConfig(mixture={f"{tmp_path}/0.tar": 1, f"{tmp_path}/2.tar": 2})
    assert set(used_words(mixture, TEXT).token_ids) == {0, START, END} | pieces("a red heart whale")
    monkeypatch.setattr("ldm.data.fetch.FIRST_PAUSE", 0.001)
    (tmp_path / "0.tar").unlink()
    for copy in (tmp_path / "cache").glob("*0.tar"):  # its index is known still
        copy.unlink()
    assert set(used_words(command, TEXT).token_ids) == {0, START, END} | pieces("a kite")


# ---------------------------------------------------------------- retrieval


def test_retrieval_of_a_perfect_and_of_a_collapsed_model():
    captions = [str(i) for i in range(20)]
    assert set(retrieval(torch.eye(20), captions).values()) == {1.0}
    assert set(retrieval(torch.ones(20, 20), captions).values()) == {0.0}


def test_retrieval_counts_each_direction_and_depth():
    similarity = torch.eye(10)
    similarity[0, 1:4] = 2  # picture 0 likes three other captions better; captions 1 to 3 like picture 0 better
    figures = retrieval(similarity, [str(i) for i in range(10)])
    expected = {"picture_to_caption_top1": 0.9, "picture_to_caption_top5": 1.0}
    assert figures == pytest.approx(expected | {"caption_to_picture_top1": 0.7, "caption_to_picture_top5": 1.0})


def test_retrieval_does_not_punish_the_same_words():
    similarity = torch.eye(4)
    similarity[0, 1] = similarity[1, 0] = 1
    assert set(retrieval(similarity, ["cat", "cat", "dog", "cow"]).values()) == {1.0}
    assert retrieval(similarity, ["cat", "hat", "dog", "cow"])["picture_to_caption_top1"] == 0.5


# ---------------------------------------------------------------- the stage


def test_a_run_leaves_what_others_read(tmp_path: Path):
    """Twelve steps on the fixture through the loop; the loss falls, both towers can be read back and agree."""
    from ldm.checkpoints import native
    from ldm.checkpoints.opening import open_checkpoint
    from ldm.training.loop import train
    from ldm.training.processes import make_accelerator

    made = stage()
    train(made, TRAINING.loop, make_accelerator(TRAINING.loop, tmp_path), tmp_path, TRAINING)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0] < 1.5 * math.log(16)
    assert {"validation/loss", "validation/caption_to_picture_top5"} <= lines[-1].keys()

    text, image = open_checkpoint(tmp_path).load("text"), load_image_tower(tmp_path)
    assert text.config == made.towers.text.config and len(text.config.token_ids) > 50
    assert native.read_config(tmp_path).image_size == 32
    assert json.loads((tmp_path / "image_tower.json").read_text())["logit_scale"] > 1
    assert text.encode(["a red heart", ""]).shape == (2, 12, 32)
    pictures = torch.zeros(2, 3, 32, 32)
    assert image(pictures).shape == text.features(text.tokenize(["a", "b"])[0]).shape == (2, 24)
    live = made.towers.image.eval()
    with torch.no_grad():  # what is exported is the average, not the last weights, but of the same network
        difference = (image(pictures) - live(pictures)).abs().max()
    assert 0 < difference < 1


def test_the_unknown_word_is_trained_and_nothing_else_is_hidden():
    made = stage()
    assert made.unknown is not None and made.unknown not in made.towers.text.config.token_ids
    captions = ["a red heart on a blue background, flat emoji"] * 500
    keys = [str(i) for i in range(500)]
    tokens, _ = made.towers.text.tokenize(captions)
    hidden = made._hide_words(tokens, Draws(0, 3, keys))
    changed = hidden != tokens
    assert (hidden[changed] == made.unknown).all()
    assert not changed[:, 0].any() and torch.equal(hidden == END, tokens == END)
    words = int(((tokens != START) & (tokens != END) & (tokens != 0)).sum())
    assert 0.01 < changed.sum() / words < 0.03
    again = made._hide_words(tokens[250:], Draws(0, 3, keys[250:]))
    assert torch.equal(again, hidden[250:])  # a sample's draw does not depend on its batch
    loss = made.towers.text.features(hidden).square().sum()
    loss.backward()
    assert made.towers.text.token_embedding.weight.grad[-1].abs().max() > 0


def test_the_logit_scale_stays_below_100():
    made = stage()
    made.towers.logit_scale.data.fill_(10.0)
    batch = next(iter(made.batches))
    _, loss, logs = next(made.losses(batch, Draws(0, 0, batch.key), 0, {"clip": made.towers}))
    assert logs["logit_scale"].item() == pytest.approx(math.exp(MAX_LOGIT_SCALE)) == pytest.approx(100)
    assert loss.isfinite()


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="micro_batch"):
        stage(dataclasses.replace(TRAINING, loop=dataclasses.replace(TRAINING.loop, micro_batch=4)))
    with pytest.raises(UserError, match=r"image_tower\.size=64 and data\.size=32"):
        stage(dataclasses.replace(TRAINING, image_tower=ImageTowerConfig(size=64)))
    with pytest.raises(UserError, match="not a multiple"):
        stage(dataclasses.replace(TRAINING, image_tower=ImageTowerConfig(size=32, patch=7)))
    with pytest.raises(UserError, match="divide"):
        stage(dataclasses.replace(TRAINING, image_tower=ImageTowerConfig(size=32, width=33)))
    with pytest.raises(UserError, match=r"leave data\.buckets at 0"):
        stage(dataclasses.replace(TRAINING, data=dataclasses.replace(TRAINING.data, buckets=8)))


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "clip").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe: Path):
    config = settings.load(ClipTraining, recipe)
    with torch.device("meta"):
        ClipTowers(config.model, config.image_tower)
    assert config.image_tower.size == config.data.size


def test_a_damaged_picture_tower_is_told(tmp_path: Path):
    from ldm.conditioning.image_tower import ImageTower, save_image_tower

    tower = ImageTower(TRAINING.image_tower, 24)
    save_image_tower(tmp_path, tower, 14.0)
    read = load_image_tower(tmp_path)
    assert all(torch.equal(value, tower.state_dict()[name]) for name, value in read.state_dict().items())
    assert not read.training and not any(parameter.requires_grad for parameter in read.parameters())
    weights = tmp_path / "image_tower.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_image_tower(tmp_path)
    save_image_tower(tmp_path, tower, 14.0)
    document = tmp_path / "image_tower.json"
    document.write_text(document.read_text().replace('"layers": 1', '"layers": 2'))
    with pytest.raises(UserError, match="two files are of different networks"):
        load_image_tower(tmp_path)
    document.unlink()
    with pytest.raises(UserError, match=r"image_tower\.json"):
        load_image_tower(tmp_path)


# ---------------------------------------------------------------- several processes


def _inputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(1000, 2000, (8, 12), generator=draw)
    tokens[:, 0], tokens[:, 6] = START, END
    return torch.randn(8, 3, 32, 32, generator=draw), tokens


def contrast(**settings: bool | int) -> nn.Module:
    declare_missing_operators()
    from open_clip.loss import ClipLoss

    return ClipLoss(**settings)  # type: ignore[arg-type]


def _towers() -> ClipTowers:
    torch.manual_seed(0)
    return ClipTowers(TEXT, TRAINING.image_tower)


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    towers = _towers()
    image, tokens = (whole.chunk(2)[rank] for whole in _inputs())
    loss = contrast(local_loss=False, gather_with_grad=True, rank=rank, world_size=2)
    network = DistributedDataParallel(towers)  # kept by name: it averages gradients for as long as it lives
    loss(*network(image, tokens)).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in towers.named_parameters()}, f"{folder}/gradients.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path: Path):
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    towers = _towers()
    contrast()(*towers(*_inputs())).backward()
    shared = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, parameter in towers.named_parameters():
        assert parameter.grad is not None
        error = (shared[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, name
