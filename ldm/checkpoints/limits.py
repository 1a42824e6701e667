"""How large a model may say it is before anything is built or allocated for it: its settings may be a stranger's."""

from __future__ import annotations

from ldm.errors import UserError
from ldm.model_config import MMDiTConfig, ModelConfig
from ldm.ranges import MAX_SIDE, MAX_STEPS, check

MAX_BLOCKS = 1024  # of one network, counted level by level; Stable Diffusion XL's U-Net has 90
MAX_CONTEXT = 4096  # tokens; the causal mask is square
MAX_TOKENIZER = 16 << 20  # bytes; T5's has 2.4 million
MAX_GRID = 1024  # patches along a side of the table of positions


def check_size(config: ModelConfig, where: str) -> ModelConfig:
    """`config` itself; raises UserError if it describes something that no machine would hold, or is out of range."""
    found: list[tuple[str, int, int]] = [("image_size", config.image_size, MAX_SIDE)]
    if (a := config.autoencoder) is not None:
        found.append(("autoencoder levels x blocks", len(a.multipliers) * (a.blocks + 1), MAX_BLOCKS))
    if config.t5 is not None:
        found += [("t5.layers", config.t5.layers, MAX_BLOCKS), ("t5.tokenizer", config.t5.tokenizer, MAX_TOKENIZER)]
    found.append(("encoder.t5_tokens", config.encoder.t5_tokens, MAX_CONTEXT))
    for name, t in config.towers.items():
        found.append((f"{name}.layers", t.layers, MAX_BLOCKS))
        found.append((f"{name}.context_length", t.context_length, MAX_CONTEXT))
    if (u := config.unet) is not None:
        if isinstance(u, MMDiTConfig):
            found += [("unet.depth", u.depth, MAX_BLOCKS), ("unet.grid", u.grid, MAX_GRID)]
        else:
            blocks = len(u.multipliers) * (u.blocks + 1) * max(1, u.transformer_depth, *u.depths)
            found.append(("unet levels x blocks", blocks, MAX_BLOCKS))
    if (s := config.schedule) is not None:
        found.append(("schedule.steps", s.steps, MAX_STEPS))
    for name, value, most in found:
        if value > most:
            raise UserError(f"{where} describes a model with {name} {value:,} (at most {most:,} are read); check it")
    check(config, where)
    return config
