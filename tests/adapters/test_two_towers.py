"""LoRAs and words for a model of two text towers, in everybody's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.adapters import use
from ldm.adapters.changes import Factors
from ldm.adapters.lora import Lora, Rows
from ldm.api import LatentDiffusion, assemble
from ldm.autoencoder.codec import Codec
from ldm.checkpoints.lora import read_lora, save_lora
from ldm.conditioning.clip import TextTower
from ldm.errors import UserError
from ldm.jobs.adapters import Adapter
from ldm.model_config import AutoencoderConfig, EncoderConfig, ModelConfig, ScheduleConfig, TextConfig, UNetConfig
from ldm.unet import UNet

UNET = UNetConfig(
    channels=32,
    multipliers=(1, 2),
    blocks=1,
    attention_levels=(1,),
    transformer_depth=2,
    heads=2,
    context_width=96,
    linear_projection=True,
    vector_width=40 + 6 * 4,
)
XL = {"padding": "eot", "layers": 2, "layer": "penultimate", "final_norm": False}
FIRST = TextConfig(width=32, heads=2, embed_dim=0, quick_gelu=True, **XL)  # type: ignore[arg-type]
SECOND = TextConfig(width=64, heads=2, embed_dim=40, **XL)  # type: ignore[arg-type]
TOLD = EncoderConfig(pooled=True, sizes=4, empty="zeros")


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    torch.manual_seed(0)
    config = ModelConfig(
        AutoencoderConfig(kind="identity", in_channels=4, scale=(1.0,)),
        FIRST,
        UNET,
        ScheduleConfig(),
        encoder=TOLD,
        text_2=SECOND,
    )
    towers = {"text": TextTower(FIRST), "text_2": TextTower(SECOND)}
    codec = Codec(None, config.autoencoder)  # type: ignore[arg-type]
    return assemble(config, codec, {k: t.eval().requires_grad_(False) for k, t in towers.items()}, UNet(UNET).eval())


LAYER = "encoder.layers.1.self_attn"
BOTH = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")


@pytest.mark.parametrize(
    ("module", "sides", "part", "name"),
    [
        ("lora_te1_text_model_encoder_layers_1_self_attn_k_proj", BOTH[0], "text", "in_proj"),
        ("lora_te2_text_model_encoder_layers_1_self_attn_k_proj", BOTH[0], "text_2", "in_proj"),
        (f"text_encoder.text_model.{LAYER}.k_proj", BOTH[1], "text", "in_proj"),
        (f"text_encoder_2.text_model.{LAYER}.k_proj", BOTH[1], "text_2", "in_proj"),
        (f"text_encoders.clip_g.transformer.text_model.{LAYER}.k_proj", BOTH[1], "text_2", "in_proj"),
        (f"clip_g.text_model.{LAYER}.k_proj", BOTH[0], "text_2", "in_proj"),
    ],
)
def test_all_names_of_both_towers(
    tmp_path: Path, model: LatentDiffusion, module: str, sides: tuple[str, str], part: str, name: str
) -> None:
    width = model.towers[part].config.width
    save_file(
        {module + sides[0]: torch.ones(2, width), module + sides[1]: torch.ones(width, 2)}, tmp_path / "a.safetensors"
    )
    found = read_lora(tmp_path / "a.safetensors", model.unet, model.towers)
    assert {key: set(each) for key, each in found.changes.items()} == {
        part: {Rows("transformer.resblocks.1.attn.in_proj_weight", 1, 3)}
    }


def test_the_projection_is_changed_as_the_linear_layer_that_it_is_elsewhere(tmp_path: Path, model: LatentDiffusion):
    torch.manual_seed(1)
    down, up = torch.randn(2, 64), torch.randn(40, 2)
    names = {"lora_te2_text_projection.lora_down.weight": down, "lora_te2_text_projection.lora_up.weight": up}
    save_file({**names, "lora_te2_text_projection.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    made = use.apply(model, [Adapter("lora", str(tmp_path / "a.safetensors"), 0.5)])
    both = (each.towers["text_2"].named_parameters() for each in (model, made))
    before, after = (dict(parameters)["text_projection"] for parameters in both)
    torch.testing.assert_close(after, before + 0.5 * (up @ down).T)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_what_is_written_is_read(tmp_path: Path, model: LatentDiffusion, layout: str):
    def change(out: int, width: int) -> Factors:
        return Factors(torch.randn(2, width), torch.randn(out, 2), 2.0)

    rows = Rows("transformer.resblocks.0.mlp.c_fc.weight")
    query = Rows("middle.0.transformer.blocks.1.cross_attention.query.weight")
    lora = Lora({"unet": {query: change(64, 64)}, "text": {rows: change(128, 32)}, "text_2": {rows: change(256, 64)}})
    save_lora(tmp_path / "a.safetensors", lora, model.unet, model.towers, layout)
    found = read_lora(tmp_path / "a.safetensors", model.unet, model.towers)
    for part, changes in lora.changes.items():
        for key, wanted in changes.items():
            weight = dict(model.unet.named_parameters() if part == "unet" else model.towers[part].named_parameters())[
                key.name
            ]
            torch.testing.assert_close(found.changes[part][key].of(weight), wanted.of(weight))


def vectors(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(width))


def test_a_word_has_vectors_for_each_tower(tmp_path: Path, model: LatentDiffusion):
    path = tmp_path / "cat-toy.safetensors"
    save_file({"clip_l": vectors(2, 32), "clip_g": vectors(2, 64)}, path)
    made = use.apply(model, [Adapter("embedding", str(path))])
    tokens = [tower.tokenize(["a cat-toy"])[0] for tower in made.towers.values()]
    assert torch.equal(*tokens) and int((tokens[0] >= 49408).sum()) == 2
    for tower, own, width in zip(made.towers.values(), tokens, (32, 64), strict=True):
        assert tower.rows is not None
        assert torch.equal(tower.token_embedding(tower.rows[own[own >= 49408]]), vectors(2, width))
    assert not any("alone" in notice or "passed over" in notice for notice in made.told)
    assert made.encoder.texts(["a cat-toy"]).context is not None


@pytest.mark.parametrize(("width", "name"), [(32, "text"), (64, "text_2")])
def test_a_word_for_one_tower_alone_is_told(tmp_path: Path, model: LatentDiffusion, width: int, name: str):
    path = tmp_path / "toy.safetensors"
    save_file({"emb_params": vectors(1, width)}, path)
    made = use.apply(model, [Adapter("embedding", str(path))])
    assert any("for one text tower alone" in notice for notice in made.told)
    for part, tower in made.towers.items():
        assert bool((tower.tokenize(["toy"])[0] >= 49408).any()) == (part == name)


def test_a_word_of_another_width_is_refused(tmp_path: Path, model: LatentDiffusion):
    path = tmp_path / "toy.safetensors"
    save_file({"emb_params": vectors(1, 48)}, path)
    with pytest.raises(UserError, match="another text tower"):
        use.apply(model, [Adapter("embedding", str(path))])
