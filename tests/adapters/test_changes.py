"""Each kind of change: against sums written out, as layers that act in a row, and against peft's of the same kind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from unet.small import inputs, randomize, relative

from ldm.adapters.changes import Factors, Hadamard, Kronecker, Magnitude, Product
from ldm.adapters.lora import Rows, merged
from ldm.checkpoints.lora import read_lora
from ldm.conditioning.clip import TextTower
from ldm.errors import UserError
from ldm.unet import UNet

from .test_lora import EVERYWHERE, TEXT, UNET, peer_unet, their

FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
QUERY = "middle.0.transformer.blocks.0.self_attention.query"
FLAT_CONV = "lora_unet_down_blocks_1_resnets_0_conv1"
CONV = "down.1.stages.0.residual.conv_in"  # (64, 32, 3, 3)
R, ALPHA = 3, 2.0


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return randomize(UNet(UNET)).eval()


def some(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / math.sqrt(shape[-1])


def changed(tmp_path: Path, unet: UNet, tensors: dict[str, Tensor], name: str, scale: float = 1.0) -> Tensor:
    """What a file of `tensors` adds to the parameter `name`, float64."""
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    made = merged({"unet": unet}, [(read_lora(tmp_path / "x.safetensors", unet, None), scale)])["unet"]
    others = {key for key, value in made.state_dict().items() if not torch.equal(value, unet.state_dict()[key])}
    assert others == {name}
    return (made.state_dict()[name].double() - unet.state_dict()[name].double()) / scale


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b.double(), atol=2e-6, rtol=1e-5)


def hada(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    names = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    return {f"hada_{name}": some(*shape) + 0.1 * i for i, (name, shape) in enumerate(zip(names, shapes, strict=False))}


def at(module: str, sides: dict[str, Tensor], alpha: float | None = ALPHA) -> dict[str, Tensor]:
    found = {f"{module}.{side}": value for side, value in sides.items()}
    return found if alpha is None else found | {f"{module}.alpha": torch.tensor(alpha)}


def test_loha(tmp_path: Path, unet: UNet) -> None:
    s = hada((64, R), (R, 64), (64, R), (R, 64))
    expected = torch.zeros(64, 64, dtype=torch.float64)
    for i in range(R):
        for j in range(R):
            a, b, c, d = (s[f"hada_{n}"].double() for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
            expected += torch.outer(a[:, i], b[i]) * torch.outer(c[:, j], d[j])
    assert close(changed(tmp_path, unet, at(FLAT, s), f"{QUERY}.weight"), expected * ALPHA / R)
    assert close(changed(tmp_path, unet, at(FLAT, s, None), f"{QUERY}.weight", 0.5), expected)

    s = hada((64, R), (R, 32 * 9), (64, R), (R, 32 * 9))  # of a convolution
    expected = ((s["hada_w1_a"] @ s["hada_w1_b"]) * (s["hada_w2_a"] @ s["hada_w2_b"])).reshape(64, 32, 3, 3)
    assert close(changed(tmp_path, unet, at(FLAT_CONV, s), f"{CONV}.weight"), expected * ALPHA / R)

    s = hada((R, 64), (R, 32), (R, 64), (R, 32), (R, R, 3, 3), (R, R, 3, 3))  # with cores; both factors lie
    halves = [torch.zeros(64, 32, 3, 3, dtype=torch.float64) for _ in range(2)]
    for n, half in enumerate(halves, 1):
        a, b, t = (s[f"hada_{key}"].double() for key in (f"w{n}_a", f"w{n}_b", f"t{n}"))
        for i in range(R):
            for j in range(R):
                half += torch.outer(a[i], b[j])[..., None, None] * t[i, j]
    assert close(changed(tmp_path, unet, at(FLAT_CONV, s), f"{CONV}.weight"), halves[0] * halves[1] * ALPHA / R)


def test_lokr(tmp_path: Path, unet: UNet) -> None:
    """out = a * c + b and in = d * e + f: number by number."""
    w1, w2 = some(4, 8), some(16, 8)
    expected = torch.zeros(64, 64, dtype=torch.float64)
    for o in range(64):
        for i in range(64):
            expected[o, i] = w1[o // 16, i // 8].double() * w2[o % 16, i % 8].double()
    name = f"{QUERY}.weight"
    whole = {"lokr_w1": w1, "lokr_w2": w2}
    assert close(changed(tmp_path, unet, at(FLAT, whole), name), expected)  # no rank, so alpha does not count
    assert close(changed(tmp_path, unet, at(FLAT, whole, None), name), expected)

    a, b, c, d = some(4, R), some(R, 8), some(16, 2), some(2, 8)
    for sides, rank in (
        ({"lokr_w1": w1, "lokr_w2_a": c, "lokr_w2_b": d}, 2),
        ({"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2": w2}, R),
        ({"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d}, 2),
    ):
        one = w1 if "lokr_w1" in sides else a @ b
        two = w2 if "lokr_w2" in sides else c @ d
        assert close(changed(tmp_path, unet, at(FLAT, sides), name), torch.kron(one, two) * ALPHA / rank)

    # of a convolution (64, 32, 3, 3): whole, flat, and with a core
    w1, w2 = some(4, 8), some(16, 4, 3, 3)
    expected = torch.einsum("ac,bdkl->abcdkl", w1, w2).reshape(64, 32, 3, 3)
    name = f"{CONV}.weight"
    assert close(changed(tmp_path, unet, at(FLAT_CONV, {"lokr_w1": w1, "lokr_w2": w2}), name), expected)
    a, b = some(16, R), some(R, 4 * 9)
    sides = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}
    expected = torch.einsum("ac,bdkl->abcdkl", w1, (a @ b).reshape(16, 4, 3, 3)).reshape(64, 32, 3, 3)
    assert close(changed(tmp_path, unet, at(FLAT_CONV, sides), name), expected * ALPHA / R)
    a, b, t = some(R, 16), some(R, 4), some(R, R, 3, 3)
    sides = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
    expected = torch.einsum("ac,ijkl,ib,jd->abcdkl", w1, t, a, b).reshape(64, 32, 3, 3)
    assert close(changed(tmp_path, unet, at(FLAT_CONV, sides), name), expected * ALPHA / R)


@pytest.mark.parametrize("core", [False, True])
def test_locon_acts_as_its_convolutions_in_a_row(tmp_path: Path, unet: UNet, core: bool) -> None:
    up, x = some(64, R, 1, 1), some(2, 32, 6, 6)
    down = some(R, 32, 1, 1) if core else some(R, 32, 3, 3)
    sides = {"lora_up.weight": up, "lora_down.weight": down} | ({"lora_mid.weight": some(R, R, 3, 3)} if core else {})
    change = changed(tmp_path, unet, at(FLAT_CONV, sides), f"{CONV}.weight")
    inner = F.conv2d(F.conv2d(x, down), sides["lora_mid.weight"], padding=1) if core else F.conv2d(x, down, padding=1)
    row = F.conv2d(inner, up) * ALPHA / R
    assert torch.allclose(F.conv2d(x.double(), change, padding=1), row.double(), atol=1e-5)


def test_differences_of_weights_biases_and_norms(tmp_path: Path, unet: UNet) -> None:
    value = some(64, 64)
    assert close(changed(tmp_path, unet, at(FLAT, {"diff": value}, None), f"{QUERY}.weight"), value)
    bias = some(64)
    assert close(changed(tmp_path, unet, {f"{FLAT_CONV}.diff_b": bias}, f"{CONV}.bias"), bias)
    norm = "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm1"
    name = "middle.0.transformer.blocks.0.norm_self"
    assert close(changed(tmp_path, unet, {f"{norm}.w_norm": bias}, f"{name}.weight"), bias)
    assert close(changed(tmp_path, unet, {f"{norm}.b_norm": bias}, f"{name}.bias"), bias)
    with pytest.raises(UserError, match="of a bias, which this model does not have"):
        changed(tmp_path, unet, {f"{FLAT}.diff_b": bias}, "")


@pytest.mark.parametrize(("axis", "side"), [(0, "dora_scale"), (1, "dora_scale"), (0, "lora_magnitude_vector.weight")])
@pytest.mark.parametrize("conv", [False, True])
def test_dora(tmp_path: Path, unet: UNet, axis: int, side: str, conv: bool) -> None:
    """Each row's (or column's) length is the one given; peft's vector lies across in a convolution."""
    flat, name = (FLAT_CONV, f"{CONV}.weight") if conv else (FLAT, f"{QUERY}.weight")
    weight = unet.state_dict()[name].double()
    up, down = some(64, R), some(R, *weight.shape[1:])
    tall = (up @ down.flatten(1)).reshape(weight.shape).double() * ALPHA / R + weight
    lengths = some(weight.shape[axis]).abs() + 0.5
    shape = [1] * weight.ndim
    shape[1 if "vector" in side and conv else axis] = -1
    said = lengths if "vector" in side and not conv else lengths.reshape(shape)
    sides = {"lora_up.weight": up[..., None, None] if conv else up, "lora_down.weight": down, side: said}
    rows = tall.transpose(0, axis).flatten(1)
    rows = rows / rows.norm(dim=1, keepdim=True) * lengths.double()[:, None]
    expected = rows.reshape(tall.transpose(0, axis).shape).transpose(0, axis) - weight
    assert close(changed(tmp_path, unet, at(flat, sides), name), expected)
    assert close(changed(tmp_path, unet, at(flat, sides), name, 0.25), expected)  # a quarter of the way


def test_of_a_text_tower_each_third_changes_by_itself(tmp_path: Path, unet: UNet) -> None:
    """open_clip keeps q, k and v in one matrix: the length of DoRA's rows and columns is each third's own."""
    text = randomize(TextTower(TEXT)).eval()
    flat = "lora_te_text_model_encoder_layers_1_self_attn_k_proj"
    up, down, lengths, bias = some(32, R), some(R, 32), some(1, 32).abs(), some(32)
    sides = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": lengths, "diff_b": bias}
    save_file(at(flat, sides), tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", unet, text)
    made = merged({"unet": unet, "text": text}, [(lora, 1.0)])["text"].state_dict()
    for kind in ("weight", "bias"):
        name = f"transformer.resblocks.1.attn.in_proj_{kind}"
        q, k, v = text.state_dict()[name].chunk(3)
        new = k + bias if kind == "bias" else k + up @ down * ALPHA / R
        new = new if kind == "bias" else new / new.norm(dim=0, keepdim=True) * lengths
        assert torch.allclose(made[name], torch.cat([q, new, v]), atol=1e-5)


def test_shapes_that_do_not_go_together_are_told_before_anything_is_computed(tmp_path: Path, unet: UNet) -> None:
    """Small files of which a product would fill the memory, too."""
    huge = 1 << 20
    thin = some(huge, 1)
    for change in (
        Hadamard(Product(thin, thin.T), Product(thin, thin.T), 1.0),
        Hadamard(Product(some(4, 2), some(3, 8)), Product(some(4, 2), some(2, 8)), 1.0),
        Kronecker(Product(thin, thin.T), Product(thin, thin.T), 1.0),
        Factors(thin.T, thin, 1.0),
        Factors(some(2, 8), some(4, 2), 1.0, some(2, 3, 3, 3)),
        Magnitude(Factors(some(2, 8), some(4, 2), 1.0), some(5), 0),
    ):
        assert not change.fits((4, 8)) and not change.fits((4, 8, 3, 3))
    assert Factors(some(2, 8, 1, 1), some(4, 2), 1.0, some(2, 2, 3, 3)).fits((4, 8, 3, 3))


# ---------------------------------------------------------------- peft's


def settings(kind: str) -> Any:
    import peft

    kinds = {
        "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=EVERYWHERE),
        "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=EVERYWHERE),
        "loha with cores": lambda: peft.LoHaConfig(
            r=4, alpha=6, use_effective_conv2d=True, target_modules=EVERYWHERE, alpha_pattern={"conv1": 2}
        ),
        "lokr": lambda: peft.LoKrConfig(r=2, alpha=6, decompose_both=True, target_modules=EVERYWHERE),
        "lokr with cores": lambda: peft.LoKrConfig(r=2, alpha=6, use_effective_conv2d=True, target_modules=EVERYWHERE),
        "lokr of whole matrices": lambda: peft.LoKrConfig(
            r=32, alpha=6, target_modules=EVERYWHERE, rank_pattern={"attn1.to_q": 40}
        ),
        "lora": lambda: peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=EVERYWHERE,
            rank_pattern={r"attn1\.to_(q|k)": 2, "conv1": 6},
            alpha_pattern={r".*attn2\.(to_q|to_k)": 32, "attn2.to_q": 3, "mid_block.resnets.0.conv1": 2},
        ),
        "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=EVERYWHERE),
    }
    return kinds[kind]()


@pytest.mark.parametrize(
    "kind",
    ["dora", "loha", "loha with cores", "lokr", "lokr with cores", "lokr of whole matrices", "lora", "rslora"],
)
def test_as_peft_has_it(tmp_path: Path, unet: UNet, kind: str) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    there = peer_unet(unet)
    x = inputs()
    with torch.no_grad():
        plain = their(there, x)
    config = settings(kind)
    peft.inject_adapter_in_model(config, there)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in there.named_parameters():
            if any(part in name for part in ("lora_A", "lora_B", "hada_", "lokr_")):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            if "magnitude" in name:
                value.mul_(1.5)
    state = {f"base_model.model.{k}": v for k, v in peft.get_peft_model_state_dict(there).items()}
    save_file({k: v.detach().contiguous() for k, v in state.items()}, tmp_path / "adapter_model.safetensors")
    plain_settings = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain_settings, default=str))
    lora = read_lora(tmp_path / "adapter_model.safetensors", unet, None)
    assert len(lora.changes["unet"]) > 20
    made = merged({"unet": unet}, [(lora, 1.0)])["unet"]
    expected = their(there, x)
    assert relative(expected, plain) > 0.01
    with torch.no_grad():
        assert relative(made(*x), expected) < 2e-5
    if kind == "lora":
        factors = {rows.name: f for rows, f in lora.changes["unet"].items() if isinstance(f, Factors)}
        assert factors[f"{QUERY}.weight"].rank == 2 and factors[f"{QUERY}.weight"].alpha == 6
        assert factors[f"{QUERY.replace('self', 'cross')}.weight"].alpha == 32  # the first that matches
        assert factors["middle.0.residual.conv_in.weight"].alpha == 2
        assert Rows(f"{QUERY}.weight") in lora.changes["unet"]
