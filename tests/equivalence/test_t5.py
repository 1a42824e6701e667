"""Stable Diffusion 3 with its third reader, a T5 of random weights and a tokenizer of a few pieces, against
StableDiffusion3Pipeline and transformers, in float64; files, both ways."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm.api import CheckpointNotice
from ldm.checkpoints import export, native, networks
from ldm.checkpoints.opening import open_checkpoint
from ldm.conditioning import t5_tokenizer
from ldm.errors import MemoryNotice
from ldm.jobs import Settings
from ldm.model_config import ModelConfig, T5Config, UNetConfig
from ldm.sampling import NoiseStream

from . import stable_diffusion as sd
from .test_sd3 import double, pipeline

pytest.importorskip("tokenizers")

PROMPTS = ["a red heart", "two cats & a DOG, 4k!! </s> <extra_id_0>"]
PREFIX = "text_encoders.t5xxl.transformer."
TINY = {"d_model": 256, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu"}


def document() -> bytes:
    """A tokenizer.json in which words are cut into letters and some syllables."""
    letters = "abcdefghijklmnopqrstuvwxyzDOG4!&,"
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(piece, -4.0 - 0.01 * i) for i, piece in enumerate(("▁", *letters))]
    pieces += [("▁a", -2.0), ("▁red", -3.0), ("▁heart", -3.5), ("at", -3.0), ("▁two", -3.0)]
    return t5_tokenizer.written([*pieces, ("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)], b"")


def with_t5(folder: Path) -> Any:
    pipe = pipeline("rms_norm")
    import transformers

    torch.manual_seed(1)
    pipe.register_modules(text_encoder_3=transformers.T5EncoderModel(transformers.T5Config(vocab_size=64, **TINY)))
    for name, parameter in pipe.text_encoder_3.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    pipe.text_encoder_3.eval()
    (folder / "own").mkdir()
    (folder / "own" / "tokenizer.json").write_bytes(document())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 2, "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "own" / "tokenizer_config.json").write_text(json.dumps(settings))
    pipe.register_modules(tokenizer_3=transformers.T5TokenizerFast.from_pretrained(folder / "own"))
    pipe.save_pretrained(folder / "pipe")
    return pipe


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("t5")
    pipe = with_t5(folder)
    yield pipe.to(torch.float64), folder / "pipe"


@pytest.fixture(scope="module")
def single(small: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a single file."""
    path = tmp_path_factory.mktemp("single") / "whole.safetensors"
    found = open_checkpoint(small[1])
    export.write(path, found.config, states(found), "original")
    return path


def states(found: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {name: dict(found.state(name)) for name in native.part_names(found.config)}


def load(path: Path, **how: Any) -> ldm.LatentDiffusion:
    return ldm.load(path, device="cpu", backend="torch", **how)


def doubled(model: ldm.LatentDiffusion) -> ldm.LatentDiffusion:
    model.encoder.double()
    return double(model)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("tokens", [77, 256, 5])
def test_tokens_and_states_are_the_pipelines(small: tuple[Any, Path], tokens: int) -> None:
    pipe, folder = small
    ours = doubled(load(folder, settings={"encoder.t5_tokens": tokens}))
    assert ours.encoder.t5 is not None
    read = pipe.tokenizer_3(PROMPTS, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
    found, dropped = ours.encoder.t5.tokenize(PROMPTS, tokens)
    assert torch.equal(found, read.input_ids)
    assert dropped == (["", "s & a DOG, 4k!! </s> <extra_id_0>"] if tokens == 5 else ["", ""])
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=tokens
        )
        told = ours.encoder.texts(PROMPTS)
        states = pipe.text_encoder_3(read.input_ids)[0]
    assert told.context is not None and told.pooled is not None
    assert told.context.shape == (2, 77 + tokens, 256)
    torch.testing.assert_close(told.context, context, rtol=0, atol=1e-6)
    torch.testing.assert_close(told.context[:, 77:], states, rtol=0, atol=1e-12)
    torch.testing.assert_close(told.pooled, pooled, rtol=0, atol=1e-6)


def test_a_guided_trajectory_with_three_towers_is_the_same(small: tuple[Any, Path]) -> None:
    pipe, folder = small
    ours = doubled(load(folder))
    settings = Settings(cfg=5.0, steps=20, sampler="euler", spacing="uniform", width=48, height=32)
    noise = NoiseStream([3], (16, 16, 24)).initial()
    with torch.no_grad():
        *_, last = ours.sample(PROMPTS[1], seed=3, settings=settings)
        latent = pipe(
            PROMPTS[1],
            negative_prompt="",
            guidance_scale=5.0,
            num_inference_steps=20,
            latents=noise.double(),
            height=32,
            width=48,
            output_type="latent",
            max_sequence_length=77,
        ).images
        *_, without = doubled(load(folder, settings={"t5": None})).sample(PROMPTS[1], seed=3, settings=settings)
    assert sd.relative(last.x / (1 + last.sigma_next), latent) < 1e-4
    assert sd.relative(without.x / (1 + last.sigma_next), latent) > 1e-2  # T5 is not all the same


def test_without_it_zeros_stand_in_its_place_and_it_is_said(small: tuple[Any, Path]) -> None:
    with pytest.warns(CheckpointNotice, match="without T5: zeros"):
        model = load(small[1], settings={"t5": None})
    assert model.encoder.t5 is None and model.config.t5 is None and "t5" not in model.checkpoint.parts
    context = model.encoder.texts(PROMPTS).context
    assert context is not None and context.shape == (2, 154, 256) and not context[:, 77:].any()
    assert model.hash != load(small[1]).hash
    with pytest.raises(ldm.UserError, match=r"encoder\.t5_tokens .*, or leave T5 out: t5=null"):
        load(small[1], settings={"encoder.t5_tokens": 0})


def test_weights_interpolate_from_the_empty_prompt_and_long_prompts_are_read_to_their_end(
    small: tuple[Any, Path],
) -> None:
    model = doubled(load(small[1]))
    t5 = model.encoder.t5
    assert t5 is not None
    with torch.no_grad():
        plain, empty = t5(t5.tokenize(["a red heart, two"], 77)[0]), t5(t5.tokenize([""], 77)[0])
        torch.testing.assert_close(t5.weighted("a red heart, two", 77), plain, rtol=0, atol=0)
        found = t5.weighted("a (red heart:1.5), two", 77)
        tokens = t5.pieces.encode("a red heart, two", add_special_tokens=False).tokens
        changed = [i for i in range(77) if not torch.equal(found[0, i], plain[0, i])]
        assert [tokens[i] for i in changed] == ["▁red", "▁heart"]
        expected = empty[0, changed] + 1.5 * (plain[0, changed] - empty[0, changed])
        torch.testing.assert_close(found[0, changed], expected, rtol=0, atol=1e-12)
        assert t5.weighted("a red heart, " * 30, 77).shape[1] == len(t5.pieces.encode("a red heart, " * 30).ids) > 77
        assert t5.weighted("a red heart BREAK two " * 300, 77).shape == (1, 512, 256)
    long = "a red heart, " * 30
    assert any("77 tokens that T5 reads; dropped: " in notice for notice in model.encoder.notices([long]))
    assert not any("T5" in notice for notice in model.encoder.notices([long], weighted=True))
    settings = Settings(steps=1, width=32, height=32, prompt_syntax="weighted")
    assert model.txt2img([long, "a (cat:0.5)"], settings=settings, batch_size=2).isfinite().all()


def test_each_tower_is_dropped_by_itself(small: tuple[Any, Path]) -> None:
    model = load(small[1])
    texts = model.encoder.texts(PROMPTS)
    assert texts.context is not None
    yes, no = torch.tensor([True, True]), torch.tensor([True, False])
    third = model.encoder.without(texts, {"text": yes, "text_2": yes, "t5": no}).context
    first = model.encoder.without(texts, {"text": no, "text_2": yes, "t5": yes}).context
    assert third is not None and first is not None
    assert torch.equal(third[:, :77], texts.context[:, :77]) and torch.equal(third[0], texts.context[0])
    assert not third[1, 77:].any() and texts.context[1, 77:].any()
    assert (
        torch.equal(first[:, 77:], texts.context[:, 77:]) and not first[1, :77, :64].any() and first[1, :77, 64:].any()
    )


# ---------------------------------------------------------------- less memory


def test_layers_read_while_it_runs_give_the_same_bits_and_leave_nothing(
    small: tuple[Any, Path], tmp_path: Path
) -> None:
    usual, sparing = load(small[1]), load(small[1], low_memory=True)
    for model in (usual, sparing):
        assert model.encoder.t5 is not None
    resting: Any = sparing.encoder.t5
    assert not list(resting.parameters()) and usual.encoder.t5 is not None and list(usual.encoder.t5.parameters())
    for _ in range(2):
        assert torch.equal(usual.encoder.texts(PROMPTS).context, sparing.encoder.texts(PROMPTS).context)
        assert all(parameter.is_meta for parameter in resting.encoder.parameters())
    parts = {"unet": sparing.unet, "autoencoder": sparing.codec.autoencoder, **sparing.encoder.weights}
    native.save(tmp_path / "written", sparing.config, parts)  # type: ignore[arg-type]
    written, given = (open_checkpoint(path).state("t5") for path in (tmp_path / "written", small[1]))
    assert all(torch.equal(written[key], given[key]) for key in given)
    sparing.encoder.double()
    assert resting(resting.tokenize(["a"], 3)[0]).dtype == torch.float64
    half = sparing.to(dtype="bf16")
    assert half.encoder.texts(["a"]).context.isfinite().all()


def test_a_T5_that_does_not_fit_is_read_layer_by_layer_and_it_is_said(
    small: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.device.free_memory", lambda device: 100_000)
    with pytest.warns(MemoryNotice, match=r"T5 takes 0\.0 GB beside .* one by one .*--set t5=null"):
        model = load(small[1])
    assert model.encoder.t5 is not None and not list(model.encoder.t5.parameters())
    assert model.hash == load(small[1], low_memory=True).hash


def test_in_float16_what_overflows_is_float32(small: tuple[Any, Path]) -> None:
    """As in transformers, which keeps the MLP's last layer in float32."""
    tower = open_checkpoint(small[1]).load("t5", dtype=torch.float16)
    import transformers

    peer = transformers.T5EncoderModel.from_pretrained(small[1] / "text_encoder_3", dtype=torch.float16)
    tokens = tower.tokenize(PROMPTS, 20)[0]
    with torch.no_grad():
        found, wanted = tower(tokens), peer(tokens)[0]
    assert tower.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == torch.float32
    assert sd.relative(found, wanted.float()) < 2e-3


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("to", ["original", "diffusers", "native", "native file"])
def test_what_is_written_is_the_same_model_bit_for_bit(small: tuple[Any, Path], tmp_path: Path, to: str) -> None:
    found = open_checkpoint(small[1])
    path = tmp_path / ("model" if to in ("diffusers", "native") else "model.safetensors")
    if to.startswith("native"):
        native.save(path, found.config, states(found))
    else:
        export.write(path, found.config, states(found), to)
    again = open_checkpoint(path)
    assert again.config == found.config and again.config.t5 is not None and not again.foreign
    for name, state in states(found).items():
        other = again.state(name)
        assert set(other) == set(state)
        for key, value in state.items():
            assert torch.equal(other[key], value), key
    if to == "original":
        tensors = load_file(path)
        own = {key for key in tensors if key.startswith(PREFIX)} - {f"{PREFIX}tokenizer_json"}
        names = {key for key in small[0].text_encoder_3.state_dict()}
        assert {key.removeprefix(PREFIX) for key in own} == names | {"shared.weight", "encoder.embed_tokens.weight"}


def test_converted_to_half_precision_its_tokenizer_stays_what_it_is(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(tool: str, *words: object) -> None:
        path = str(Path(__file__).parents[2] / "tools" / f"{tool}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, words)])
        runpy.run_path(path, run_name="__main__")

    run("convert_checkpoint", single, tmp_path / "half.safetensors", "--to", "original", "--precision", "fp16")
    before, after = load_file(single), load_file(tmp_path / "half.safetensors")
    assert set(before) == set(after)
    for key, value in after.items():
        data = key == f"{PREFIX}tokenizer_json"
        assert value.dtype == (torch.uint8 if data else torch.float16)
        assert torch.equal(value, before[key].to(value.dtype)), key
    run("inspect_checkpoint", tmp_path / "half.safetensors")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["t5"]]
    assert "in   30 tensors, float16" in line


def test_diffusers_opens_what_is_written(small: tuple[Any, Path], tmp_path: Path) -> None:
    pipe, folder = small
    found = open_checkpoint(folder)
    export.write(tmp_path / "model", found.config, states(found), "diffusers")
    again = sd.peers().StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    mine, other = pipe.text_encoder_3.state_dict(), again.text_encoder_3.state_dict()
    assert set(mine) == set(other)
    assert all(torch.equal(value.float(), other[key]) for key, value in mine.items())
    assert again.tokenizer_3(PROMPTS).input_ids == pipe.tokenizer_3(PROMPTS).input_ids


def taken_out(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], bytes]:
    """A single file's tensors without T5's, those of T5 without the prefix, and its tokenizer."""
    tensors = load_file(path)
    third = {key.removeprefix(PREFIX): tensors.pop(key) for key in list(tensors) if key.startswith(PREFIX)}
    return tensors, third, bytes(third.pop("tokenizer_json").numpy())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("folder", ["", "text_encoders"])
def test_a_float8_file_beside_the_model_is_read_as_what_it_holds(
    single: Path, tmp_path: Path, folder: str, scaled: bool
) -> None:
    others, third, tokenizer = taken_out(single)
    save_file(others, tmp_path / "sd3.safetensors")
    kept = {key: value.to(torch.float8_e4m3fn) for key, value in third.items()}
    meant = {key: value.float() for key, value in kept.items()}
    if scaled:
        for key in [key for key in kept if key.endswith(".q.weight")]:
            kept[key.replace(".weight", ".scale_weight")] = torch.tensor(0.25)
            meant[key] = meant[key] * 0.25
        kept["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    (tmp_path / folder / "tokenizer_3").mkdir(parents=True)
    (tmp_path / folder / "tokenizer_3" / "tokenizer.json").write_bytes(tokenizer)
    name = "t5xxl_fp8_e4m3fn_scaled" if scaled else "t5xxl_fp8_e4m3fn"
    save_file({key: value.clone() for key, value in kept.items()}, tmp_path / folder / f"{name}.safetensors")
    found = open_checkpoint(tmp_path / "sd3.safetensors")
    assert any(name in notice for notice in found.notices)
    for dtype in (torch.float32, torch.bfloat16):
        state = found.load("t5", dtype=dtype).state_dict()
        assert bytes(state.pop("tokenizer").numpy()) == tokenizer
        assert set(state) == set(meant) - {"shared.weight"}
        assert all(torch.equal(value, meant[key].to(dtype)) for key, value in state.items())
    if not scaled:
        export.write(tmp_path / "again.safetensors", found.config, states(found), "original")
        written = load_file(tmp_path / "again.safetensors")
        assert all(torch.equal(written[f"{PREFIX}{key}"].float(), value) for key, value in meant.items())
        assert written[f"{PREFIX}shared.weight"].dtype == torch.float8_e4m3fn


def test_a_float8_T5_inside_the_file_and_no_tokenizer(single: Path, tmp_path: Path) -> None:
    """As published; what is missing is told when it is loaded, so that a file can be looked at and converted."""
    others, third, tokenizer = taken_out(single)
    path = tmp_path / "sd3_medium_incl_clips_t5xxlfp8.safetensors"
    inside = {f"{PREFIX}{key}": value.to(torch.float8_e4m3fn).clone() for key, value in third.items()}
    save_file(others | inside, path)
    found = open_checkpoint(path)
    assert found.config.t5 == T5Config(64, 256, 4, 16, 48, 3, 32, 0) and not found.foreign
    assert set(found.state("t5")) == set(third) - {"shared.weight"}
    with pytest.raises(ldm.UserError, match=r"no tokenizer.* into a folder tokenizer_3 .*--set t5=null"):
        load(path)
    export.write(tmp_path / "model", found.config, states(found), "diffusers")
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["tokenizer_3"] == [None, None]
    assert load(path, settings={"t5": None}).encoder.t5 is None
    (tmp_path / "tokenizer_3").mkdir()
    (tmp_path / "tokenizer_3" / "tokenizer.json").write_bytes(tokenizer)
    assert load(path).encoder.texts(PROMPTS).context is not None


def test_a_tokenizer_of_more_pieces_than_the_table_has_rows_is_refused(small: tuple[Any, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(small[1], tmp_path / "pipe")
    plain = json.loads(document())
    pieces = [(piece, score) for piece, score in plain["model"]["vocab"]] + [(f"x{i}", -9.0) for i in range(64)]
    (tmp_path / "pipe" / "tokenizer_3" / "tokenizer.json").write_bytes(t5_tokenizer.written(pieces, b""))
    with pytest.raises(ldm.UserError, match="has 108 pieces, and T5 64"):
        load(tmp_path / "pipe").encoder.texts(["a"])


def test_a_model_with_T5_and_another_network_is_not_written_in_foreign_layouts(small: tuple[Any, Path]) -> None:
    config = open_checkpoint(small[1]).config
    with pytest.raises(ldm.UserError, match=r"no place for .*T5"):
        export.write(
            "nowhere.safetensors", replace(config, unet=UNetConfig()), {key: {} for key in native.PARTS}, "original"
        )


def test_other_versions_of_T5_are_refused_by_name(single: Path, small: tuple[Any, Path], tmp_path: Path) -> None:
    tensors = load_file(single)
    first = {key: value for key, value in tensors.items() if ".wi_1." not in key}
    first = {key.replace(".wi_0.", ".wi."): value for key, value in first.items()}
    save_file(first, tmp_path / "first.safetensors")
    with pytest.raises(ldm.UserError, match=r"not one of version 1\.1 \(it has no .*wi_0"):
        open_checkpoint(tmp_path / "first.safetensors")
    plain = json.loads((small[1] / "text_encoder_3" / "config.json").read_text())
    from ldm.checkpoints.t5 import read_config

    assert read_config(plain, "here") == T5Config(64, 256, 4, 16, 48, 3, 32)
    with pytest.raises(ldm.UserError, match="feed_forward_proj is relu"):
        read_config(plain | {"feed_forward_proj": "relu"}, "here")
    with pytest.raises(ldm.UserError, match="model_type is umt5"):
        read_config(plain | {"model_type": "umt5"}, "here")


def test_names_and_shapes_of_the_published_one() -> None:
    """4,762,310,656 values in 219 tensors, or in 220 with the table twice: 9.79 GB in float16."""
    sd.peers()
    import transformers

    tower = networks.skeleton("t5", ModelConfig(t5=T5Config()), "here")
    ours = {key: tuple(value.shape) for key, value in tower.state_dict().items()}
    published = {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "feed_forward_proj": "gated-gelu",
    }
    with torch.device("meta"), networks._Undrawn():
        peer = transformers.T5EncoderModel(transformers.T5Config(**published))
    theirs = {key: tuple(value.shape) for key, value in peer.state_dict().items()}
    assert ours == {key: shape for key, shape in theirs.items() if key != "shared.weight"}
    assert len(theirs) == 220 and len(ours) == 219
    assert sum(parameter.numel() for parameter in tower.parameters()) == 4_762_310_656


def test_without_transformers_it_says_what_to_install(small: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ldm.UserError, match=r"needs transformers: pip install -e '\.\[t5\]'.*--set t5=null"):
        load(small[1])
    assert load(small[1], settings={"t5": None}).encoder.t5 is None
