"""LoRAs of the transformer: everybody's names lead to the same rows, and what is trained here is read by others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.adapters.lora import Rows, merged
from ldm.adapters.low_rank import AdaptedUNet
from ldm.checkpoints.lora import read_lora, save_lora

from .test_mmdit import TWO, made, told

KOHYA = "lora_unet_joint_blocks_0_x_block_attn_qkv"
OF_CONTEXT = "blocks.1.context.attention.qkv.weight"
MLP = "blocks.0.context.mlp.0.weight"
QKV = "blocks.1.image.attention.qkv.weight"


@pytest.mark.parametrize(
    ("module", "sides", "name", "piece"),
    [
        ("lora_unet_joint_blocks_1_x_block_attn_qkv", ("lora_down", "lora_up"), QKV, None),
        (
            "lora_unet_joint_blocks_0_context_block_mlp_fc1",
            ("lora_down", "lora_up"),
            "blocks.0.context.mlp.0.weight",
            None,
        ),
        ("diffusion_model.joint_blocks.1.x_block.attn.qkv", ("lora_A", "lora_B"), QKV, None),
        ("transformer.transformer_blocks.1.attn.to_k", ("lora_A", "lora_B"), QKV, 1),
        ("lora_transformer_transformer_blocks_1_attn_to_v", ("lora_down", "lora_up"), QKV, 2),
        (
            "lora_unet_transformer_blocks_1_attn_add_q_proj",
            ("lora_down", "lora_up"),
            QKV.replace("image", "context"),
            0,
        ),
    ],
)
def test_each_name_leads_to_its_rows(
    tmp_path: Path, module: str, sides: tuple[str, str], name: str, piece: int | None
) -> None:
    network = made(TWO).float()
    weight = network.get_parameter(name)
    rows = weight.shape[0] if piece is None else weight.shape[0] // 3
    torch.manual_seed(0)
    down, up = torch.randn(4, weight.shape[1]), torch.randn(rows, 4)
    save_file({f"{module}.{sides[0]}.weight": down, f"{module}.{sides[1]}.weight": up}, tmp_path / "it.safetensors")
    lora = read_lora(tmp_path / "it.safetensors", network, None)
    assert set(lora.changes["unet"]) == {Rows(name) if piece is None else Rows(name, piece, 3)}
    changed = merged({"unet": network}, [(lora, 0.5)])["unet"].get_parameter(name)
    expected = weight.detach().clone()
    start = 0 if piece is None else piece * rows
    expected[start : start + rows] += 0.5 * up @ down
    torch.testing.assert_close(changed.detach(), expected)


def test_what_diffusers_has_in_another_order_is_put_in_ours(tmp_path: Path) -> None:
    """norm_out.linear gives scale and shift, ours shift and scale: the change's halves are swapped."""
    network = made(TWO).float()
    down, up = torch.randn(2, 32), torch.randn(64, 2)
    start = "transformer.norm_out.linear"
    save_file({f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}, tmp_path / "it.safetensors")
    lora = read_lora(tmp_path / "it.safetensors", network, None)
    changed = merged({"unet": network}, [(lora, 1.0)])["unet"].get_parameter("modulation_out.weight")
    torch.testing.assert_close(changed.detach(), network.modulation_out.weight.detach() + (up @ down).roll(32, 0))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("layers", ["attention", "transformer"])
def test_what_is_trained_is_written_in_their_names_and_does_the_same(tmp_path: Path, layout: str, layers: str) -> None:
    network, condition = made(TWO).float(), told(TWO)
    condition = type(condition)(**{key: part.float() for key, part in condition.parts().items()})
    adapted = AdaptedUNet(network, 2, 4.0, layers)
    for parameter in adapted.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 700.0])
    with torch.no_grad():
        expected = adapted(x, t, condition)
    save_lora(tmp_path / "it.safetensors", adapted.lora(), network, None, layout)
    names = list(load_file(tmp_path / "it.safetensors"))
    start = {
        "diffusers": "transformer.transformer_blocks.0.attn.to_q.",
        "kohya": "lora_unet_joint_blocks_0_x_block_attn_qkv.",
    }
    assert any(name.startswith(start[layout]) for name in names)
    plain = made(TWO).float()
    lora = read_lora(tmp_path / "it.safetensors", plain, None)
    with torch.no_grad():
        torch.testing.assert_close(merged({"unet": plain}, [(lora, 1.0)])["unet"](x, t, condition), expected)
        assert not torch.allclose(plain(x, t, condition), expected, atol=1e-2)
