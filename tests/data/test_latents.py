"""Cached latents: what goes in comes out, what another network made does not."""

import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save

from ldm.checkpoints import native
from ldm.checkpoints.opening import open_checkpoint
from ldm.config import DataConfig, DiffusionLossConfig, DiffusionTraining, LoopConfig, ModelConfig
from ldm.data.latent_writing import LatentSources, LatentWriter, merge_parts, part_folder
from ldm.data.latents import LatentLoader, _LatentDecode, latent_fingerprint
from ldm.data.loader import Loader
from ldm.data.records import BadSample, Record
from ldm.errors import UserError
from ldm.training.backward import accumulate
from ldm.training.processes import Division
from ldm.training.stage_two import diffusion_stage

from .shard_maker import bare, picture, sample, write_tar

PRINT = {"autoencoder": "a1", "text": "t1", "pictures": "8 pixels, center crop"}


def moments(image):
    """A linear stand-in for an encoder: (B, 3, 8, 8) -> (B, 2 * 3, 2, 2), exact in float16 sums."""
    pooled = torch.nn.functional.avg_pool2d(image, 4)
    return torch.cat([pooled, -pooled], 1)


def context(captions):
    """(K, L = 2, D = 3): numbers of each caption's letters."""
    return torch.tensor([[[len(text), ord(text[0]), ord(text[-1])]] * 2 for text in captions], dtype=torch.float32)


@pytest.fixture
def source(tmp_path) -> DataConfig:
    members = []
    for i in range(11):
        captions = [f"caption of k{i}", f"{'x' * i} variant"] if i % 3 else []
        members += sample(f"k{i}", i, **({"captions": captions} if captions else {}))
    members[13:13] = [("broken.png", b"no"), ("broken.txt", b"text")]
    config = DataConfig(shards=str(write_tar(tmp_path / "x.tar", members)), size=8, streams=2, workers=0)
    return replace(config, flip=True, caption="variants")


def fill(
    folder: Path, source: DataConfig, stop: int | None = None, flipped=True, prints=PRINT, per_shard=4, precision="fp32"
):
    """Write (the first `stop` batches of) the set as precompute_latents.py would; returns where it began."""
    sources = LatentSources(source)
    writer = LatentWriter(folder, prints, sources.fingerprint, flipped, per_shard, precision=precision)
    start = writer.start
    for batch in islice(sources.batches(3, start), stop):
        mirrored = moments(batch.image.flip(-1)).half() if flipped else None
        writer.add(batch, moments(batch.image).half(), mirrored, [context(texts) for texts in batch.captions])
    if stop is None:
        writer.finish()
    return start


def load(folder, source, seed=2, **changes):
    return LatentLoader(replace(source, shards=str(folder), **changes), 4, 0, 1, seed, PRINT)


def test_cached_latents_are_what_the_pictures_would_have_given(tmp_path, source):
    fill(tmp_path / "set", source)
    latents = list(islice(load(tmp_path / "set", source), 12))
    pictures = list(islice(Loader(source, 4, 0, 1, 2), 12))
    wanted = {}
    for batch in pictures:
        for key, epoch, image, caption in zip(batch.key, batch.epoch, batch.image, batch.caption, strict=True):
            wanted[key, epoch] = (moments(image[None])[0], context([caption])[0])
    shared = 0
    for batch in latents:
        assert batch.moments.shape == (4, 6, 2, 2) and batch.context.shape == (4, 2, 3) and len(batch) == 4
        assert batch.moments.dtype == batch.context.dtype == torch.float32
        for row in range(4):
            key = batch.key[row], batch.epoch[row]
            if key in wanted:
                shared += 1
                torch.testing.assert_close(batch.moments[row], wanted[key][0], atol=1e-3, rtol=1e-3)
                assert torch.equal(batch.context[row], wanted[key][1])
    assert shared > 30


def test_crop_and_size_are_what_the_pictures_path_records(tmp_path):
    """In the same order, mirrored or not: wide and tall pictures."""
    members = []
    for i in range(12):
        members += [(f"k{i}.png", picture(i, (24 + 5 * (i % 3), 24 + 7 * (i % 2)))), (f"k{i}.txt", b"x")]
    path = str(write_tar(tmp_path / "x.tar", members))
    config = DataConfig(shards=path, size=8, streams=2, workers=0, flip=True, shuffle=0)
    fill(tmp_path / "set", config)
    seen = set()
    for ours, theirs in zip(islice(load(tmp_path / "set", config), 9), Loader(config, 4, 0, 1, 2), strict=False):
        assert (ours.key, ours.epoch) == (theirs.key, theirs.epoch)
        assert torch.equal(ours.size, theirs.size) and torch.equal(ours.crop, theirs.crop)
        seen |= set(map(tuple, ours.crop.tolist()))
    assert len(seen) > 3


def test_another_set_of_pictures_is_noticed_where_they_are_at_hand(tmp_path, source, caplog):
    made = {**PRINT, **{k: v for k, v in latent_fingerprint(None, None, source).items() if k == "set of pictures"}}
    fill(tmp_path / "set", source, prints=made)
    again = replace(source, shards=str(tmp_path / "set"))
    LatentLoader(again, 4, 0, 1, 0, made)
    gone = latent_fingerprint(None, None, replace(source, shards=str(tmp_path / "away.tar")))
    assert "set of pictures" not in gone and "whether latents are of these pictures cannot be told" in caplog.text
    LatentLoader(again, 4, 0, 1, 0, PRINT)  # only the latents are at hand
    write_tar(tmp_path / "x.tar", [member for i in range(40) for member in sample(f"k{i}", i)])
    other = latent_fingerprint(None, None, source)["set of pictures"]
    with pytest.raises(UserError, match=r"are stale: they were made with another set of pictures; make them again"):
        LatentLoader(again, 4, 0, 1, 0, {**PRINT, "set of pictures": other})


def test_the_precision_of_the_networks_is_told_and_not_mixed(tmp_path, source, caplog):
    fill(tmp_path / "set", source, stop=2, precision="bf16")
    with pytest.raises(UserError, match=r"holds latents with another precision; remove the folder"):
        fill(tmp_path / "set", source)
    fill(tmp_path / "set", source, precision="bf16")
    load(tmp_path / "set", source)
    assert "were encoded in bf16, so losses differ a little" in caplog.text


def test_latents_are_read_from_a_store_as_pictures_are(tmp_path, source):
    import fsspec

    fill(tmp_path / "set", source)
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "set").iterdir():
        memory.pipe(f"/latents-of-a-test/{path.name}", path.read_bytes())
    local = [batch.key for batch in islice(load(tmp_path / "set", source), 6)]
    cache = {"cache": str(tmp_path / "cache")}
    for name in ("memory://latents-of-a-test", "memory://latents-of-a-test/latents-*.tar"):
        loader = load(name, source, **cache)
        assert [batch.key for batch in islice(loader, 6)] == local
    with pytest.raises(UserError, match=r"memory://elsewhere has no latents.json \(FileNotFoundError"):
        load("memory://elsewhere", source, **cache)
    with pytest.raises(UserError, match=r"latents cannot come from a command"):
        load(f"pipe:cat {tmp_path}/set/latents-00000.tar", source, allow_pipe=True)
    manifest = json.loads((tmp_path / "set" / "latents.json").read_text())
    memory.pipe("/latents-of-a-test/latents.json", json.dumps({**manifest, "fingerprint": {}}).encode())
    with pytest.raises(UserError, match=r"are stale"):  # the manifest is read anew, however long its shards are kept
        load("memory://latents-of-a-test", source, **cache)


def test_a_training_step_has_the_loss_that_it_has_on_the_fly(tmp_path, tiny_checkpoint, tiny_model):
    """The same samples, captions, flips, noise, levels and dropout; contexts and moments were rounded on the way."""
    members = [each for i in range(24) for each in sample(f"{i:05d}", i, captions=["a cat", "a red dog", "kites"])]
    half = len(members) // 2
    for name, part in (("0", members[:half]), ("1", members[:half])):  # numbered alike
        write_tar(tmp_path / f"{name}.tar", part)
    data = DataConfig(shards=f"{tmp_path}/*.tar", size=32, streams=4, workers=0, shuffle=0, flip=True)
    data = replace(data, caption="variants")
    config = DiffusionTraining(
        autoencoder=str(tiny_checkpoint),
        text=str(tiny_checkpoint),
        model=tiny_model.unet.config,
        data=data,
        loss=DiffusionLossConfig(caption_dropout=0.3),
        loop=LoopConfig(steps=1, global_batch=8, seed=2),
    )
    model = open_checkpoint(tiny_checkpoint)
    prints = latent_fingerprint(model, model, data)
    sources = LatentSources(data)
    writer = LatentWriter(tmp_path / "set", prints, sources.fingerprint, True, 7)
    with torch.inference_mode():
        for batch in sources.batches(5):
            posteriors = [tiny_model.codec.posterior(image).moments() for image in (batch.image, batch.image.flip(-1))]
            writer.add(batch, *posteriors, [tiny_model.text.encode(texts) for texts in batch.captions])
    writer.finish()
    found = []
    for each in (config, replace(config, latents=str(tmp_path / "set"))):
        stage = diffusion_stage(each, 0, 1, torch.device("cpu"))
        losses = []
        for step, batch in enumerate(islice(stage.batches, 4)):
            made = accumulate(
                stage, batch, Division(1, 2, 4), {"unet": stage.model.unet}, Accelerator(cpu=True), 2, step
            )
            losses.append(torch.tensor(made.each_loss))
        found.append((torch.stack(losses), [p.grad for p in stage.model.unet.parameters() if p.grad is not None]))
    (fly, fly_gradients), (cached, cached_gradients) = found
    assert fly.shape == (4, 8) and float(fly.std()) > 0.01
    torch.testing.assert_close(cached, fly, rtol=2e-3, atol=2e-3)
    for ours, theirs in zip(cached_gradients, fly_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()) + 1e-6)


def test_plain_settings_take_the_plain_picture_and_the_first_caption(tmp_path, source):
    fill(tmp_path / "set", source, flipped=False)
    batch = next(iter(load(tmp_path / "set", source, flip=False, caption="txt", workers=1)))
    assert all(
        batch.context[i, 0].tolist() == context([f"caption of {bare(key)}"])[0, 0].tolist()
        for i, key in enumerate(batch.key)
    )


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_an_interrupted_set_goes_on_and_becomes_the_same_files(tmp_path, source, stop):
    fill(tmp_path / "whole", source)
    fill(tmp_path / "set", source, stop=stop)
    if stop:
        with pytest.raises(UserError, match=r"not complete|has no latents.json|no file matches"):
            load(tmp_path / "set", source)
    assert fill(tmp_path / "set", source) == {0: 0, 1: 0, 2: 4, 3: 9}[stop]  # sample 4 is the broken one
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == ["latents-00000.tar", "latents-00001.tar", "latents-00002.tar", "latents.json"]
    for name in names:
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_source_shards_may_number_their_samples_alike(tmp_path, source):
    write_tar(tmp_path / "y.tar", [member for i in range(3) for member in sample(f"k{i}", 50 + i)])
    both = replace(source, shards=f"{tmp_path}/*.tar")
    fill(tmp_path / "set", both, per_shard=100)
    cached = load(tmp_path / "set", both, shuffle=0)
    assert cached.samples_per_epoch == 14 and len(cached.data.shards) == 1
    wanted = {(f"{shard}/k{i}", e) for shard, count in (("x", 11), ("y", 3)) for i in range(count) for e in range(2)}
    found = [dict(zip(zip(b.key, b.epoch, strict=True), b.moments, strict=True)) for b in islice(cached, 7)]
    assert {row for batch in found for row in batch} == wanted
    for batch in islice(Loader(both, 4, 0, 1, 2), 8):  # drawn alike though shards and order are others
        for key, epoch, image in zip(batch.key, batch.epoch, batch.image, strict=True):
            for rows in found:
                if (key, epoch) in rows:
                    torch.testing.assert_close(rows[key, epoch], moments(image[None])[0], atol=1e-3, rtol=1e-3)


def test_finished_sets_are_known_as_such(tmp_path, source):
    fill(tmp_path / "set", source)
    sources = LatentSources(source)
    writer = LatentWriter(tmp_path / "set", PRINT, sources.fingerprint, True, 4)
    assert writer.complete and writer.start == len(sources) == 12


def test_a_stale_set_is_refused_by_the_name_of_what_changed(tmp_path, source):
    fill(tmp_path / "set", source, prints={**PRINT, "autoencoder": "a2"})
    with pytest.raises(UserError, match=r"stale: they were made with another autoencoder; make them again"):
        load(tmp_path / "set", source)
    with pytest.raises(UserError, match="holds latents with another fingerprint"):
        fill(tmp_path / "set", source)
    with pytest.raises(UserError, match="holds latents with another fingerprint and flipped"):
        fill(tmp_path / "set", source, flipped=False)


def test_what_a_set_cannot_serve_is_said(tmp_path, source):
    fill(tmp_path / "set", source, flipped=False)
    with pytest.raises(UserError, match=r"have no flipped copies; set data.flip=false"):
        load(tmp_path / "set", source)
    with pytest.raises(UserError, match=r"set data.crop=center"):
        load(tmp_path / "set", source, crop="random")
    for setting in ({"buckets": 4}, {"mixture": {"x.tar": 1.0}}):
        with pytest.raises(UserError, match=f"squares of one set; leave out data.{next(iter(setting))}"):
            load(tmp_path / "set", source, flip=False, **setting)


def test_parts_that_were_merged_halfway_are_merged_again(tmp_path, source):
    sources, whole = LatentSources(source), tmp_path / "set"
    for part, (first, stop) in enumerate([(0, 6), (6, 12)]):
        writer = LatentWriter(part_folder(whole, part, 2), PRINT, sources.fingerprint, False, 4, first=first)
        for batch in sources.batches(3, writer.start, stop):
            writer.add(batch, moments(batch.image).half(), None, [context(texts) for texts in batch.captions])
        with pytest.raises(UserError, match=r"not complete|no latents.json"):
            merge_parts(whole, 2)
        writer.finish()
    (part_folder(whole, 0, 2) / "latents-00000.tar").rename(whole / "latents-00000.tar")  # and then it was killed
    assert merge_parts(whole, 2) == 11
    assert sorted(path.name for path in whole.iterdir()) == [
        *(f"latents-{i:05d}.tar" for i in range(4)),
        "latents.json",
    ]
    loader = load(whole, source, flip=False, shuffle=0)
    assert sorted(key for batch in islice(loader, 3) for key in batch.key)[:2] == ["x/k0", "x/k0"]
    assert loader.samples_per_epoch == 11


def test_damage_to_a_set_is_noticed(tmp_path, source):
    folder = tmp_path / "set"
    fill(folder, source)
    shard, manifest = folder / "latents-00001.tar", folder / "latents.json"
    content, text = shard.read_bytes(), manifest.read_text()
    shard.write_bytes(content[: len(content) // 4])
    with pytest.raises(UserError, match=r"hold \d+ samples where latents.json counts 11"):
        load(folder, source)
    shard.write_bytes(content)
    for wrong, message in ((text[:50], "does not parse"), (json.dumps({"format": "x"}), "not of the format")):
        manifest.write_text(wrong)
        with pytest.raises(UserError, match=message):
            load(folder, source)
    manifest.unlink()
    with pytest.raises(UserError, match=r"has no latents.json, so it is no set of latents"):
        load(folder, source)


DAMAGES = {
    "nothing": {},
    "variants out of range": {"variants": torch.tensor([7])},
    "variants of pairs": {"variants": torch.tensor([[0, 1]])},
    "no flipped": {"moments_flipped": None},
    "a short crop": {"crop": torch.zeros(1, 2, dtype=torch.int64)},
    "another size": {"size": torch.tensor([8, 8, 8])},
    "flat moments": {"moments_flipped": torch.zeros(24)},
    "contexts of one": {"context": torch.zeros(2, 3)},
    "no pooled text": {"pooled": torch.zeros(0, 4)},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_sample_is_left_out(name):
    whole = {
        "moments": torch.zeros(6, 2, 2),
        "moments_flipped": torch.ones(6, 2, 2),
        "context": torch.zeros(1, 2, 3),
        "pooled": torch.zeros(1, 4),
        "variants": torch.tensor([0]),
        "size": torch.tensor([8, 8]),
        "crop": torch.zeros(2, 2, dtype=torch.int64),
    } | DAMAGES[name]
    content = save({name: value for name, value in whole.items() if value is not None})
    decode, rng = _LatentDecode("variants", True, "", (), ""), random.Random(0)  # one that flips
    record = Record("k", "x.tar", {"safetensors": content, "json": b"{}"})
    if name == "nothing":
        assert decode(record, rng).moments.mean() == 1
        return
    with pytest.raises(BadSample, match="the latents"):
        decode(record, rng)


def test_shards_of_a_set_may_be_chosen_and_filtered(tmp_path, source):
    fill(tmp_path / "set", source)
    some = LatentLoader(replace(source, shards=f"{tmp_path}/set/latents-00000.tar"), 4, 0, 1, 0, PRINT)
    assert some.samples_per_epoch == 4
    assert load(tmp_path / "set", source, where={"contexts": ["caption of k4"]}).samples_per_epoch == 1


def test_the_fingerprint_follows_weights_reading_and_pictures_but_not_scale(tmp_path, tiny_checkpoint):
    import shutil

    from ldm.checkpoints import native

    data = DataConfig(size=32)
    model = open_checkpoint(tiny_checkpoint)
    first = latent_fingerprint(model, model, data)
    assert latent_fingerprint(model, None, data)["text"] == "none"
    assert latent_fingerprint(None, model, data)["autoencoder"] == "identity"
    assert latent_fingerprint(model, model, replace(data, size=64))["pictures"] != first["pictures"]
    with pytest.raises(UserError, match=r"has no text tower"):
        native.save(tmp_path / "bare", ModelConfig(), {})
        latent_fingerprint(None, open_checkpoint(tmp_path / "bare"), data)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    config = native.read_config(copy)
    assert config.autoencoder and config.text
    rescaled = replace(config, autoencoder=replace(config.autoencoder, scale=(3.0,)))
    parts = {name: dict(open_checkpoint(copy).state(name)) for name in native.part_names(native.read_config(copy))}
    native.save(copy, rescaled, parts)
    model = open_checkpoint(copy)
    assert latent_fingerprint(model, model, data) == first
    native.save(copy, replace(rescaled, text=replace(config.text, layer="penultimate")), parts)
    model = open_checkpoint(copy)
    changed = latent_fingerprint(model, model, data)
    assert changed["text"] != first["text"] and changed["autoencoder"] == first["autoencoder"]


def test_latents_serve_a_model_that_is_the_same_in_full_precision(tmp_path: Path) -> None:
    """A run that began with the shipped model, stored in half precision, leaves the same numbers in float32."""
    half, data = open_checkpoint("icons"), DataConfig()
    parts = {"autoencoder": half.load("autoencoder").autoencoder, **half.load_towers()}
    config = replace(half.config, unet=None)
    native.save(tmp_path / "full", config, parts)
    full = open_checkpoint(tmp_path / "full")
    assert native.fingerprint(full.state("text")) != native.fingerprint(half.state("text"))
    assert latent_fingerprint(full, full, data) == latent_fingerprint(half, half, data)
    with torch.no_grad():
        next(parts["text"].parameters()).add_(1e-3)
    native.save(tmp_path / "other", config, parts)
    assert latent_fingerprint(full, open_checkpoint(tmp_path / "other"), data) != latent_fingerprint(half, half, data)
