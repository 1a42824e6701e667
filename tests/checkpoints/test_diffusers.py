"""Diffusers directories in all the forms they come in; what is not Stable Diffusion's is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoints import architectures, export, native
from ldm.checkpoints.diffusers_configs import read_autoencoder, read_unet
from ldm.checkpoints.networks import norm_groups
from ldm.checkpoints.opening import open_checkpoint
from ldm.config import AutoencoderConfig, ModelConfig
from ldm.errors import UserError

from .small_models import SMALL, SMALL_3, random_states, same

UNET, WEIGHTS = "unet", "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diffusers") / "model"
    remarks = export.write(path, SMALL, random_states(SMALL), "diffusers")
    assert len(remarks) == 3 and all(
        any(word in r for r in remarks) for word in ("last block", "projection", "entities")
    )
    return path


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def unet(written: Path) -> dict[str, Tensor]:
    return dict(open_checkpoint(written).state("unet"))


def change(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    plain = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in plain.items() if value is not None}))


def test_all_that_is_drawn_with_is_kept(written: Path):
    checkpoint = open_checkpoint(written)
    config, states = checkpoint.config, random_states(SMALL)
    assert (config.unet, config.autoencoder, config.schedule) == (SMALL.unet, SMALL.autoencoder, SMALL.schedule)
    assert (config.parameterization, config.image_size) == ("v", 16)
    assert config.text is not None and (config.text.layers, config.text.layer) == (2, "last")
    assert same(checkpoint.state("unet"), states["unet"]) and same(
        checkpoint.state("autoencoder"), states["autoencoder"]
    )
    text = checkpoint.state("text")
    assert all(torch.equal(value, states["text"][key]) for key, value in text.items())
    assert checkpoint.notices == ()


# ---------------------------------------------------------------- forms of a network's folder


def shard(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {f"m-0000{i}-of-00002.safetensors": {n: tensors[n] for n in names[i::2]} for i in (0, 1)}
    for file, some in parts.items():
        save_file(some, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def test_shards(copied: Path, unet: dict[str, Tensor]):
    shard(copied / UNET)
    assert same(open_checkpoint(copied).state("unet"), unet)


@pytest.mark.parametrize("file", ["../model_index.json", "/etc/passwd", "..", "a\\b", "sub/m.safetensors"])
def test_an_index_that_points_elsewhere_is_not_followed(copied: Path, file: str):
    shard(copied / UNET)
    index = copied / UNET / f"{WEIGHTS}.index.json"
    names = json.loads(index.read_text())["weight_map"]
    change(index, weight_map=names | {next(iter(names)): file})
    with pytest.raises(UserError, match="not a file beside it"):
        open_checkpoint(copied)


def test_a_shard_that_is_not_there(copied: Path):
    shard(copied / UNET)
    (copied / UNET / "m-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="m-00001-of-00002"):
        open_checkpoint(copied)


def test_a_shard_that_lacks_what_the_index_says(copied: Path):
    shard(copied / UNET)
    file = copied / UNET / "m-00001-of-00002.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)
    with pytest.raises(UserError, match="lack 1 tensors"):
        open_checkpoint(copied)


def test_a_variant_where_there_is_no_other(copied: Path, unet: dict[str, Tensor]):
    half = {name: value.half() for name, value in load_file(copied / UNET / WEIGHTS).items()}
    save_file(half, copied / UNET / "diffusion_pytorch_model.fp16.safetensors")
    assert same(open_checkpoint(copied).state("unet"), unet)  # the plain one goes first
    (copied / UNET / WEIGHTS).unlink()
    assert same(open_checkpoint(copied).state("unet"), {name: value.half() for name, value in unet.items()})


def test_raw_weights_are_the_variant_non_ema(copied: Path, unet: dict[str, Tensor]):
    with pytest.raises(UserError, match="non_ema"):
        open_checkpoint(copied, "raw")
    raw = {name: value + 1 for name, value in load_file(copied / UNET / WEIGHTS).items()}
    save_file(raw, copied / UNET / "diffusion_pytorch_model.non_ema.safetensors")
    assert same(open_checkpoint(copied, "raw").state("unet"), {name: value + 1 for name, value in unet.items()})


def test_pickled_weights(copied: Path, unet: dict[str, Tensor]):
    torch.save(load_file(copied / UNET / WEIGHTS), copied / UNET / "diffusion_pytorch_model.bin")
    (copied / UNET / WEIGHTS).unlink()
    assert same(open_checkpoint(copied).state("unet"), unet)


def test_no_weights(copied: Path):
    (copied / UNET / WEIGHTS).unlink()
    with pytest.raises(UserError, match="has no weights"):
        open_checkpoint(copied)


def test_text_names_with_and_without_their_prefix(copied: Path, written: Path):
    file = copied / "text_encoder" / "model.safetensors"
    tensors = {name.removeprefix("text_model."): value for name, value in load_file(file).items()}
    save_file(tensors | {"embeddings.position_ids": torch.arange(77)[None]}, file)
    assert same(open_checkpoint(copied).state("text"), open_checkpoint(written).state("text"))


# ---------------------------------------------------------------- autoencoders by themselves


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the first published ones call their attention."""
    renames = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    found = {}
    for name, value in tensors.items():
        for new, old in renames.items():
            name = name.replace(new, old)
        found[name] = value
    return found


def test_a_folder_and_a_file_of_an_autoencoder(copied: Path):
    wanted = random_states(SMALL)["autoencoder"]
    tensors = load_file(copied / "vae" / WEIGHTS)
    assert tensors["encoder.mid_block.attentions.0.to_q.weight"].ndim == 2
    save_file(old_names(tensors), copied / "vae" / WEIGHTS)
    folder = open_checkpoint(copied / "vae")
    assert folder.config == ModelConfig(SMALL.autoencoder) and folder.notices == ()
    assert same(folder.state("autoencoder"), wanted)
    for source in (tensors, old_names(tensors)):
        save_file(source, copied / "alone.safetensors")
        alone = open_checkpoint(copied / "alone.safetensors")
        assert alone.assumed == ("autoencoder.scale",) and alone.config == ModelConfig(SMALL.autoencoder)
        assert same(alone.state("autoencoder"), wanted)
    change(copied / "vae" / "config.json", scaling_factor=None)
    assert open_checkpoint(copied / "vae").assumed == ("autoencoder.scale",)
    change(copied / "vae" / "config.json", norm_num_groups=16)
    codec = open_checkpoint(copied / "vae").load("autoencoder")
    assert codec.config.norm_groups == 16 and codec.autoencoder is not None
    assert norm_groups(codec.autoencoder) == {16}
    for groups, words in ((48, "48 groups"), (0, "norm_num_groups is 0")):
        change(copied / "vae" / "config.json", norm_num_groups=groups)
        with pytest.raises(UserError, match=words):
            open_checkpoint(copied / "vae").load("autoencoder")


def test_an_autoencoder_by_itself_is_written_and_comes_back(tmp_path: Path):
    config, state = ModelConfig(SMALL.autoencoder), {"autoencoder": random_states(SMALL)["autoencoder"]}
    for name, to in (("folder", "diffusers"), ("file.safetensors", "original")):
        assert export.write(tmp_path / name, config, state, to) == []
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.config.autoencoder == SMALL.autoencoder
        assert same(checkpoint.state("autoencoder"), state["autoencoder"])


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn is gelu"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type is text_time"),
        ("unet/config.json", {"norm_num_groups": 16}, "norm_num_groups is 16"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ("unet/config.json", {"attention_head_dim": [1, 3]}, "neither one number of heads"),
        ("unet/config.json", {"layers_per_block": [1, 2]}, "differs from level to level"),
        ("unet/config.json", {"block_out_channels": [64, 96], "attention_head_dim": 1}, "not multiples"),
        ("unet/config.json", {"in_channels": "4"}, "should be a whole number"),
        ("unet/config.json", {"down_block_types": 7}, "not those of Stable Diffusion"),
        ("unet/config.json", {"sample_size": -8}, r"unet.config\.json: sample_size is -8 and should be at least 1"),
        ("unet/config.json", {"sample_size": True}, "sample_size is True and should be a whole number"),
        ("unet/config.json", {"out_channels": -4}, r"unet\.out_channels must be at least 1, not -4"),
        ("vae/config.json", {"scaling_factor": "much"}, "should be a number"),
        ("vae/config.json", {"norm_num_groups": [32]}, "should be a whole number"),
        ("scheduler/scheduler_config.json", {"beta_end": [1]}, "should be a number"),
        ("scheduler/scheduler_config.json", {"prediction_type": ["epsilon"]}, r"is not read.*prediction_type"),
        ("vae/config.json", {"latents_mean": [0.1]}, "latents_mean"),
        ("vae/config.json", {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "DownEncoderBlock2D"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("text_encoder/config.json", {"intermediate_size": 100}, "intermediate_size is 100"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.3, 0.2]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "sigmoid"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "flow"),
        ("tokenizer/vocab.json", {"cat</w>": 1}, "not CLIP's vocabulary"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline"),
    ],
)
def test_settings_that_are_not_read_are_refused(copied: Path, file: str, changes: dict[str, Any], words: str):
    change(copied / file, **changes)
    with pytest.raises(UserError, match=words):
        open_checkpoint(copied)


def test_of_stable_diffusion_3_without_its_scheduler_the_usual_shift_is_assumed(tmp_path: Path):
    export.write(tmp_path, SMALL_3, random_states(SMALL_3), "diffusers")
    assert open_checkpoint(tmp_path).assumed == ()
    shutil.rmtree(tmp_path / "scheduler")
    found = open_checkpoint(tmp_path)
    assert found.assumed == ("schedule.shift",) and found.config.schedule == SMALL_3.schedule
    change(tmp_path / "transformer" / "config.json", sample_size=-8)
    with pytest.raises(UserError, match=r"transformer.config\.json: sample_size is -8"):
        open_checkpoint(tmp_path)
    change(tmp_path / "transformer" / "config.json", sample_size=8)
    shutil.rmtree(tmp_path / "text_encoder")
    with pytest.raises(UserError, match=r"has no text tower, only .*; name a checkpoint that has one"):
        open_checkpoint(tmp_path).load("text")


def test_what_else_a_pipeline_has_is_said(copied: Path):
    assert open_checkpoint(copied).notices == ()
    change(copied / "model_index.json", controlnet=["diffusers", "ControlNetModel"], image_encoder=[None, None])
    (said,) = open_checkpoint(copied).notices
    assert "draws without controlnet, which the pipeline has" in said
    assert open_checkpoint(copied).only("autoencoder").notices == ()


def test_a_network_without_the_rest_of_its_model(copied: Path):
    with pytest.raises(UserError, match=r"unet is a network without .* the place of the folder unet in a copy"):
        open_checkpoint(copied / "unet")
    with pytest.raises(UserError, match="is of a CLIPTextModel, and of single networks only an AutoencoderKL is read"):
        open_checkpoint(copied / "text_encoder")


def test_both_ways_to_say_how_many_heads():
    plain = {"block_out_channels": [64, 128], "attention_head_dim": [4, 8]}
    kinds = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    config = read_unet(plain | kinds, "here")
    assert (config.heads, config.head_width) == (0, 16)
    config = read_unet(plain | kinds | {"num_attention_heads": 2}, "here")
    assert (config.heads, config.head_width) == (2, 0)


def test_the_published_settings_give_the_known_architectures():
    assert read_unet({"cross_attention_dim": 768}, "here") == architectures.V1_UNET
    v2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    assert read_unet(v2, "here") == architectures.V2_UNET
    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    assert read_autoencoder(vae, "here") == AutoencoderConfig()


@pytest.mark.parametrize(
    ("config", "special", "padding"),
    [
        ({"pad_token": "!"}, None, "zero"),
        ({"pad_token": {"content": "<|endoftext|>"}}, None, "eot"),
        ({"pad_token": "<|endoftext|>"}, {"pad_token": "!"}, "zero"),  # the legacy file goes first
        ({"pad_token": "<|endoftext|>", "added_tokens_decoder": {}}, {"pad_token": "!"}, "eot"),  # or is not looked at
    ],
)
def test_the_tokenizer_says_how_it_pads(
    copied: Path, config: dict[str, Any], special: dict[str, Any] | None, padding: str
):
    (copied / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    if special is None:
        (copied / "tokenizer" / "special_tokens_map.json").unlink()
    else:
        (copied / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(special))
    checkpoint = open_checkpoint(copied)
    assert checkpoint.config.text is not None and checkpoint.config.text.padding == padding


def test_a_tokenizer_that_does_not_say_is_told(copied: Path):
    shutil.rmtree(copied / "tokenizer")
    assert open_checkpoint(copied).assumed == ("text.padding",)


@pytest.mark.parametrize(
    "form", [lambda path: path.unlink(), lambda path: path.write_text("{"), lambda p: p.write_text("[]")]
)
def test_a_settings_file_that_is_missing_or_broken(copied: Path, form: Callable[[Path], Any]):
    form(copied / "unet" / "config.json")
    with pytest.raises(UserError, match=r"config\.json"):
        open_checkpoint(copied)


def test_native_files_go_in_and_out(written: Path, tmp_path: Path):
    checkpoint = open_checkpoint(written)
    states = {name: checkpoint.state(name) for name in checkpoint.parts}
    native.save(tmp_path / "n.safetensors", checkpoint.config, states)
    again = open_checkpoint(tmp_path / "n.safetensors")
    assert again.config == checkpoint.config
    assert native.fingerprint(again.tensors()) == native.fingerprint(checkpoint.tensors())
    export.write(tmp_path / "d", again.config, {name: again.state(name) for name in again.parts}, "diffusers")
    for file in ("unet/" + WEIGHTS, "vae/" + WEIGHTS, "text_encoder/model.safetensors"):
        assert same(load_file(tmp_path / "d" / file), load_file(written / file))
