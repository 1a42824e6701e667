"""LoRA: what it adds up to, that what it is merged into stays, what is refused; peft's and diffusers' are the peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from unet.small import inputs, randomize, relative, small_unet
from unet.test_unet_peers import peer

from ldm.adapters.changes import Factors
from ldm.adapters.lora import Lora, Rows, merged
from ldm.adapters.low_rank import AdaptedUNet
from ldm.checkpoints import diffusers as layout
from ldm.checkpoints.common_names import clip_names
from ldm.checkpoints.lora import read_lora, save_lora
from ldm.checkpoints.state import exported
from ldm.conditioning.clip import TextTower
from ldm.config import TextConfig, UNetConfig
from ldm.errors import UserError
from ldm.unet import UNet

UNET = UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2, context_width=12)
TEXT = TextConfig(width=32, heads=2, layers=2, embed_dim=0, quick_gelu=True, padding="eot", cleaning="plain")
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [*PROJECTIONS, "proj_in", "ff.net.0.proj", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj"]
OF_LCM = [*EVERYWHERE, "proj_out", "conv2", "downsamplers.0.conv", "upsamplers.0.conv"]  # as LCM-LoRA's file (kohya's)


@pytest.fixture(scope="module")
def text() -> TextTower:
    torch.manual_seed(0)
    return randomize(TextTower(TEXT)).eval()


def random_lora(unet: UNet, names: list[str], rank: int, seed: int, alpha: float = 3.0) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name in names:
        out, *rest = dict(unet.named_parameters())[name].shape
        down = torch.randn(rank, *rest, generator=generator)
        up = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator)
        changes[Rows(name)] = Factors(down, up, alpha)
    return Lora({"unet": changes})


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


QUERY = "middle.0.transformer.blocks.0.cross_attention.query.weight"
CONV = "down.0.stages.0.residual.conv_in.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_merged_changes_add_up_and_leave_the_old_network_alone(dtype: torch.dtype) -> None:
    unet = small_unet().to(dtype).to(memory_format=torch.channels_last)
    before = copies(unet)
    one, two = random_lora(unet, [QUERY, CONV], 2, 1), random_lora(unet, [QUERY], 3, 2, alpha=1.0)
    both = merged({"unet": unet}, [(one, 0.5), (two, -2.0)])["unet"]
    for name in (QUERY, CONV):
        change = 0.0
        for lora, scale in ((one, 0.5), (two, -2.0)):
            if (factors := lora.changes["unet"].get(Rows(name))) is not None:
                assert isinstance(factors, Factors)
                rank = len(factors.down)
                matrix = torch.einsum("or,ri->oi", factors.up.flatten(1).double(), factors.down.flatten(1).double())
                change = change + scale * factors.alpha / rank * matrix
        assert isinstance(change, Tensor)
        expected = before[name].double() + change.reshape(before[name].shape)
        assert torch.allclose(both.state_dict()[name].double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert bits(copies(unet), before)
    assert both.get_parameter(CONV).is_contiguous(memory_format=torch.channels_last)
    shared = {
        name for name, value in unet.state_dict().items() if value.data_ptr() == both.state_dict()[name].data_ptr()
    }
    assert shared == before.keys() - {QUERY, CONV}

    other = merged({"unet": unet}, [(two, -2.0), (one, 0.5)])["unet"]  # the same numbers: the sums are in float32
    assert all(
        torch.allclose(value.float(), both.state_dict()[k].float(), atol=1e-5, rtol=1e-2)
        for k, value in other.state_dict().items()
    )
    assert merged({"unet": unet}, [])["unet"] is unet


def test_what_does_not_fit() -> None:
    unet = small_unet()
    before = copies(unet)
    lora = random_lora(unet, [CONV, QUERY], 2, 1)
    factors = lora.changes["unet"][Rows(QUERY)]
    assert isinstance(factors, Factors)
    for bad, said in (
        ({Rows(QUERY): Factors(factors.down[:, :-1], factors.up, 1.0)}, "another architecture"),
        ({Rows(QUERY): Factors(factors.down, factors.up[:-1], 1.0)}, "another architecture"),
        ({Rows(QUERY): Factors(factors.down[:-1], factors.up, 1.0)}, "another architecture"),
        ({Rows(CONV.replace("weight", "bias")): factors}, "another architecture"),
        ({Rows("nowhere.weight"): factors}, "does not have"),
    ):
        with pytest.raises(UserError, match=said):
            merged({"unet": unet}, [(Lora({"unet": {**lora.changes["unet"], **bad}}), 1.0)])
    for scale in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="finite"):
            merged({"unet": unet}, [(lora, scale)])
    assert bits(copies(unet), before)


def test_training_s_changes_are_those_that_merge(tmp_path: Path) -> None:
    """Beside the layers in training, inside the weights afterwards; and through both layouts of a file."""
    unet = small_unet()
    x = inputs()
    plain = unet(*x)
    adapted = AdaptedUNet(unet, 3, 6.0, "all")
    assert torch.equal(adapted(*x), plain)  # at first it changes nothing
    randomize(adapted)
    told = adapted(*x)
    assert relative(told, plain) > 0.01 and torch.equal(unet(*x), told)
    for name in ("diffusers", "kohya"):
        save_lora(tmp_path / name, adapted.lora(), unet, None, name)
        fresh = small_unet()
        lora = read_lora(tmp_path / name, fresh, None)
        assert relative(merged({"unet": fresh}, [(lora, 1.0)])["unet"](*x), told) < 2e-5
        save_lora(tmp_path / "again", lora, fresh, None, name)  # what was read is written as it was
        assert bits(load_file(tmp_path / "again"), load_file(tmp_path / name))


def test_gradients_reach_the_changes_alone() -> None:
    unet = small_unet()
    adapted = AdaptedUNet(unet, 2, 2.0, "attention")
    adapted(*inputs()).square().sum().backward()
    assert all(p.grad is None for p in unet.parameters())
    gradients = [p.grad for name, p in adapted.named_parameters() if name.endswith("up")]
    assert all(gradient is not None for gradient in gradients) and any(bool(g.any()) for g in gradients)
    assert {name.split(".")[-1] for name in adapted.state_dict()} == {"up", "down"}
    count = len(adapted.changes)
    assert count < len(AdaptedUNet(small_unet(), 2, 2.0, "transformer").changes)
    for rank, alpha, layers, said in ((0, 1.0, "all", "positive"), (2, 0.0, "all", "positive"), (2, 1.0, "", "one of")):
        with pytest.raises(UserError, match=said):
            AdaptedUNet(unet, rank, alpha, layers)


# ---------------------------------------------------------------- files that are refused


def file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: value.clone() for name, value in tensors.items()}, path / "lora.safetensors", metadata)
    return path / "lora.safetensors"


def test_files_that_are_refused(tmp_path: Path) -> None:
    unet = UNet(UNET)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    flat = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = torch.ones(2, 64), torch.ones(64, 2)
    good = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    assert read_lora(file(tmp_path, good), unet, None).changes["unet"]
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"x": down}, "has no LoRA for this model"),
        ({f"{name}.lora_A.weight": down}, "half of it is missing"),
        ({f"{flat}.alpha": torch.tensor(1.0)}, "half of it is missing"),
        (good | {f"{name}.lora_magnitude_vector": up}, "another architecture"),
        (good | {"unet.nowhere.lora_A.weight": down}, "fit nothing"),
        (good | {"text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": down}, "fit nothing"),
        ({f"{flat}.hada_w1_a": down}, "half of it is missing"),
        (good | {f"{flat}.lora_down.weight": down}, "said twice"),
        (good | {f"{flat}.diff": torch.ones(64, 64)}, "said twice"),
        (good | {f"{flat}.alpha": torch.ones(2)}, "2 numbers as alpha"),
        (good | {f"{name}.lora_B.weight": up.long()}, "not as floats"),
        (good | {f"{name}.lora_B.weight": torch.ones(64, 2, 3, 3)}, "no matrix"),
        (good | {f"{name}.lora_B.weight": up * torch.nan}, "not finite"),
    ]
    for tensors, said in cases:
        with pytest.raises(UserError, match=said):
            merged({"unet": unet}, [(read_lora(file(tmp_path, tensors), unet, None), 1.0)])
    for alpha in ('"x"', "1e999", "1" + "0" * 400):
        with pytest.raises(UserError, match="no number"):
            read_lora(file(tmp_path, good, {"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'}), unet, None)


# ---------------------------------------------------------------- peers


def peer_unet(unet: UNet) -> Any:
    there = peer(UNET).eval()
    there.load_state_dict(exported(unet.state_dict(), layout.unet_names(unet.state_dict())))
    return there


def peer_text(tower: TextTower) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=128, num_attention_heads=2, num_hidden_layers=2, hidden_act="quick_gelu"
    )
    there = transformers.CLIPTextModel(config).eval()
    prefix = "text_model." if any(name.startswith("text_model.") for name in there.state_dict()) else ""
    state = exported(tower.state_dict(), clip_names(tower.state_dict(), prefix))
    there.load_state_dict(state, strict=False)
    return there


def their(there: Any, x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return there(*x).sample


@pytest.mark.parametrize("kind", ["adapter", "pipeline", "kohya", "original", "lcm"])
def test_theirs_draw_here_as_there(tmp_path: Path, text: TextTower, kind: str) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya

    unet = randomize(UNet(UNET)).eval()
    there, their_text = peer_unet(unet), peer_text(text)
    targets = {"adapter": EVERYWHERE, "lcm": OF_LCM}.get(kind, PROJECTIONS)
    alpha = 4 if kind == "pipeline" else 8  # diffusers' own layout takes the rank for alpha
    there.add_adapter(peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    text_targets = peft.LoraConfig(
        r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "fc1"], init_lora_weights=False
    )
    peft.inject_adapter_in_model(
        text_targets, their_text
    )  # transformers' add_adapter asks for versions ahead of peft's
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(there))
    text_layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(their_text))
    if kind == "adapter":
        there.save_lora_adapter(tmp_path)
    elif kind == "pipeline":
        StableDiffusionPipeline.save_lora_weights(tmp_path, layers, text_layers)
    else:
        state = convert_state_dict_to_kohya(
            {f"unet.{k}": v for k, v in peft.get_peft_model_state_dict(there).items()}
            | {f"text_encoder.{k}": v for k, v in peft.get_peft_model_state_dict(their_text).items()}
        )
        state = {
            name.replace("base_model_model_", "").replace("lora_te_encoder", "lora_te_text_model_encoder"): (
                torch.tensor(float(alpha)) if name.endswith("alpha") else value
            )
            for name, value in state.items()
        }
        if kind == "original":
            state = {
                name.replace("down_blocks_1_attentions_0", "input_blocks_3_1")
                .replace("mid_block_attentions_0", "middle_block_1")
                .replace("up_blocks_0_attentions_", "output_blocks_")
                .replace("output_blocks_0_", "output_blocks_0_1_")
                .replace("output_blocks_1_", "output_blocks_1_1_"): value
                for name, value in state.items()
            }
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "lora.safetensors")
    (path,) = tmp_path.glob("*.safetensors")
    lora = read_lora(path, unet, text)
    assert ("text" in lora.changes) == (kind != "adapter")
    networks = {"unet": unet, "text": text}
    x = inputs()
    made = merged(networks, [(lora, 1.0)])
    with torch.no_grad():
        assert relative(made["unet"](*x), unet(*x)) > 0.01
        assert relative(made["unet"](*x), their(there, x)) < 1e-5
        tokens, _ = text.tokenize(["a red heart"])
        expected = their_text(tokens).last_hidden_state
        if kind != "adapter":
            assert relative(made["text"](tokens), expected) < 1e-5
    if kind == "adapter":
        there.set_adapters(["default"], [0.5])
        assert relative(merged(networks, [(lora, 0.5)])["unet"](*x), their(there, x)) < 1e-5


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_ours_draw_there_as_here(tmp_path: Path, names: str) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    unet = randomize(UNet(UNET)).eval()
    there = peer_unet(unet)
    adapted = randomize(AdaptedUNet(unet, 4, 2.0, "transformer" if names == "kohya" else "all"))
    save_lora(tmp_path / "lora.safetensors", adapted.lora(), unet, None, names)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(load_file(tmp_path / "lora.safetensors"))
    there.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    x = inputs()
    with torch.no_grad():
        assert relative(their(there, x), adapted(*x)) < 1e-5
        there.disable_adapters()
        assert relative(their(there, x), adapted(*x)) > 0.01
