"""The names of LoRA files: everybody's lead to the same weight; kinds that are refused by name; peft's expressions."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from unet.small import small_unet

from ldm.adapters.changes import Factors
from ldm.adapters.lora import Rows
from ldm.checkpoints import lora_names
from ldm.checkpoints.lora import read_lora
from ldm.conditioning.clip import TextTower
from ldm.config import TextConfig
from ldm.errors import UserError
from ldm.unet import UNet

TEXT = TextConfig(width=32, heads=2, layers=2, embed_dim=0, quick_gelu=True, padding="eot", cleaning="plain")
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"
LAYER = "encoder.layers.1.self_attn"
QUERY = "middle.0.transformer.blocks.0.cross_attention.query.weight"
IN_PROJ = "transformer.resblocks.1.attn.in_proj_weight"


@pytest.fixture(scope="module")
def networks() -> tuple[UNet, TextTower]:
    return small_unet(), TextTower(TEXT)


def flat(name: str) -> str:
    return name.replace(".", "_")


def written(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path / "lora.safetensors", metadata)
    return path / "lora.safetensors"


KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
ORIGINAL = "middle_block.1.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    ("module", "sides"),
    [
        (f"lora_unet_{flat(ATTENTION)}_to_q", KOHYA),
        (f"lora_unet_{flat(ORIGINAL)}_to_q", KOHYA),
        (f"lycoris_{flat(ATTENTION)}_to_q", KOHYA),
        (f"diffusion_model.{ORIGINAL}.to_q", PEFT),
        (f"diffusion_model.{ORIGINAL}.to_q", KOHYA),
        (f"model.diffusion_model.{ORIGINAL}.to_q", PEFT),
        (f"unet.{ORIGINAL}.to_q", KOHYA),
        (f"unet.{ATTENTION}.to_q", PEFT),
        (f"unet.{ATTENTION}.to_q", (".lora.down.weight", ".lora.up.weight")),
        (f"unet.{ATTENTION}.processor.to_q", ("_lora.down.weight", "_lora.up.weight")),
        (f"{ATTENTION}.processor.to_q", ("_lora.down.weight", "_lora.up.weight")),
        (f"{ATTENTION}.to_q", ("_lora.down.weight", "_lora.up.weight")),
        (f"base_model.model.{ATTENTION}.to_q", PEFT),
        (f"base_model.model.{ATTENTION}.to_q", (".lora_A.default.weight", ".lora_B.default.weight")),
        (f"unet.base_model.model.{ATTENTION}.to_q", PEFT),
    ],
)
def test_all_names_of_the_unet_s(
    tmp_path: Path, networks: tuple[UNet, TextTower], module: str, sides: tuple[str, str]
) -> None:
    out, width = networks[0].get_parameter(QUERY).shape
    path = written(tmp_path, {module + sides[0]: torch.ones(2, width), module + sides[1]: torch.ones(out, 2)})
    lora = read_lora(path, *networks)
    assert {part: set(each) for part, each in lora.changes.items()} == {"unet": {Rows(QUERY)}}


@pytest.mark.parametrize(
    ("module", "sides"),
    [
        (f"lora_te_text_model_{flat(LAYER)}_k_proj", KOHYA),
        (f"lora_te1_text_model_{flat(LAYER)}_k_proj", KOHYA),
        (f"text_encoder.text_model.{LAYER}.k_proj", PEFT),
        (f"text_encoder.{LAYER}.k_proj", PEFT),
        (
            f"text_encoder.text_model.{LAYER}.k_proj",
            (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        ),
        (f"text_encoder.text_model.{LAYER}.to_k", ("_lora.down.weight", "_lora.up.weight")),
        (f"text_encoders.clip_l.transformer.text_model.{LAYER}.k_proj", PEFT),
        (f"clip_l.text_model.{LAYER}.k_proj", KOHYA),
        (f"base_model.model.text_model.{LAYER}.k_proj", PEFT),
    ],
)
def test_all_names_of_the_text_tower_s(
    tmp_path: Path, networks: tuple[UNet, TextTower], module: str, sides: tuple[str, str]
) -> None:
    path = written(tmp_path, {module + sides[0]: torch.ones(2, 32), module + sides[1]: torch.ones(32, 2)})
    lora = read_lora(path, *networks)
    assert {part: set(each) for part, each in lora.changes.items()} == {"text": {Rows(IN_PROJ, 1, 3)}}


def test_old_names_of_the_outputs(networks: tuple[UNet, TextTower]) -> None:
    tables = lora_names.make_tables(networks[0], {"text": networks[1]})
    for name, ours in (
        (f"unet.{ATTENTION}.processor.to_out_lora.down.weight", QUERY.replace("query", "out")),
        (f"{ATTENTION}.to_out.lora_magnitude_vector", QUERY.replace("query", "out")),
        (f"text_encoder.text_model.{LAYER}.to_out_lora.up.weight", "transformer.resblocks.1.attn.out_proj.weight"),
    ):
        parsed = lora_names.split(name)
        assert parsed is not None
        place = lora_names.place(parsed[0], tables)
        assert place is not None and tables[place[0]][place[1]]["weight"].name == ours


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_unet_mid_block_x.oft_blocks", "an OFT"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight", "a LoRA of T5"),
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight", "a LoRA of T5"),
        ("lora_unet_mid_block_x.oft_R.weight", "an OFT"),
        ("lora_unet_mid_block_x.on_input", "an IA3"),
        ("lora_unet_mid_block_x.a1.weight", "a GLoRA"),
        (f"unet.{ATTENTION}.to_q.lora_B.bias", "with biases"),
        (f"lora_te2_text_model_{flat(LAYER)}_k_proj.lora_down.weight", "Stable Diffusion XL"),
        (f"text_encoder_2.text_model.{LAYER}.k_proj.lora_A.weight", "Stable Diffusion XL"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "a transformer"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "a transformer"),
    ],
)
def test_other_kinds_are_refused_by_name(
    tmp_path: Path, networks: tuple[UNet, TextTower], name: str, said: str
) -> None:
    good = {f"lora_unet_{flat(ATTENTION)}_to_q{side}": torch.ones(2, 2) for side in KOHYA}
    for tensors in ({name: torch.ones(2)}, good | {name: torch.ones(2)}):
        where = "by a model of another kind" if "XL" in said or "transformer" in said else "here"
        with pytest.raises(UserError, match=f"is .*{said}.*, which is not supported {where}"):
            read_lora(written(tmp_path, tensors), *networks)


# ---------------------------------------------------------------- peft's settings


def adapter(path: Path, settings: dict[str, object], module: str = f"{ATTENTION}.to_q") -> Path:
    (path / "adapter_config.json").write_text(json.dumps(settings))
    name = f"base_model.model.{module}"
    return written(path, {name + PEFT[0]: torch.ones(4, 12), name + PEFT[1]: torch.ones(64, 4)})


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        ({r".*attn2\.(to_q|to_k)": 32}, 32),
        ({"to_q": 32}, 32),  # the end behind a dot
        ({f"{ATTENTION}.to_q": 32}, 32),
        ({r"attn\d\.to_[qk]": 32, "to_q": 2}, 32),  # the first
        ({"to_k": 2, "to_q": 32}, 32),
        ({"o_q": 32}, 8),  # not behind a dot
        ({"attn2": 32}, 8),  # not the end
        ({"mid_block": 32}, 8),
        ({r"mid_block\..*": 32}, 32),
        ({r"^to_q": 32}, 8),
        ({rf"^{ATTENTION}.to_q": 32}, 32),
        ({r"(?!up_blocks).*to_q": 32}, 32),
        ({}, 8),
    ],
)
def test_expressions_of_peft_s_settings(
    tmp_path: Path, networks: tuple[UNet, TextTower], patterns: dict[str, int], alpha: int
) -> None:
    path = adapter(tmp_path, {"lora_alpha": 8, "r": 4, "alpha_pattern": patterns})
    (factors,) = read_lora(path, *networks).changes["unet"].values()
    assert isinstance(factors, Factors) and factors.alpha == alpha


def test_the_settings_of_a_network_are_its_own(tmp_path: Path, networks: tuple[UNet, TextTower]) -> None:
    """diffusers keeps those of U-Net and text encoder side by side; what has none has the rank for alpha."""
    unet, text = f"unet.{ATTENTION}.to_q", f"text_encoder.text_model.{LAYER}.k_proj"
    tensors = {unet + PEFT[0]: torch.ones(4, 12), unet + PEFT[1]: torch.ones(64, 4)}
    tensors |= {text + PEFT[0]: torch.ones(4, 32), text + PEFT[1]: torch.ones(32, 4)}
    for settings, alphas in (
        ({"unet.lora_alpha": 8, "text_encoder.lora_alpha": 2, "text_encoder.alpha_pattern": {"k_proj": 3}}, (8, 3)),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 2}}, (2, 4)),
        ({"text_encoder.lora_alpha": 2, "text_encoder.use_rslora": True}, (4, 4)),
    ):
        lora = read_lora(written(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)}), *networks)
        found = [next(iter(lora.changes[part].values())) for part in ("unet", "text")]
        assert tuple(factors.alpha for factors in found if isinstance(factors, Factors)) == alphas


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"((((a+)+)+)+)+x": 2}, None),
        ({r"(\w|.)*[A-Z]": 2}, "takes too long"),
        ({"(((.{0,99}){0,99}){0,99}){0,99}[A-Z]": 2}, "is invalid"),
        ({".{1000000000}": 2}, "is invalid"),
        ({"to_q(?R)": 2}, "is invalid"),
        ({"(?i)TO_Q": 2}, "is invalid"),
        ({"(((": 2}, "is invalid"),
        ({"(" * 5000 + ")" * 5000: 2}, "is invalid"),
        ({r"to_q\L<x>": 2}, "is invalid"),
        ({"to_q": "many"}, "no number"),
        ({"to_q": float("inf")}, "no number"),
        ({"to_q": None}, "no number"),
    ],
)
def test_expressions_of_strangers(
    tmp_path: Path,
    networks: tuple[UNet, TextTower],
    monkeypatch: pytest.MonkeyPatch,
    patterns: dict[str, object],
    said: str | None,
) -> None:
    monkeypatch.setattr("ldm.checkpoints.peft_settings.MAX_SECONDS", 0.2)
    path = adapter(tmp_path, {"lora_alpha": 8, "r": 4, "alpha_pattern": patterns})
    began = time.process_time()
    if said is None:
        assert read_lora(path, *networks).changes
    else:
        with pytest.raises(UserError, match=said):
            read_lora(path, *networks)
    assert time.process_time() - began < 3
