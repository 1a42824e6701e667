"""CLIP's tokenizer in the files of Hugging Face's CLIPTokenizer, made from the vocabulary that open_clip brings."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from ldm.files import atomic_write_text
from ldm.model_config import TextConfig

SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # open_clip's words, theirs


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Piece -> token, in the order of the tokens."""
    from ldm.conditioning.clip import clip_tokenizer

    return {SPECIAL.get(piece, piece): token for piece, token in clip_tokenizer().encoder.items()}


def merges() -> list[str]:
    """The pairs that byte-pair encoding joins ("th e</w>"), the most frequent first."""
    from ldm.conditioning.clip import clip_tokenizer

    ranks = clip_tokenizer().bpe_ranks
    return [" ".join(pair) for pair in sorted(ranks, key=ranks.__getitem__)]


def write_tokenizer(folder: Path, config: TextConfig) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json."""
    pad = "<|endoftext|>" if config.padding == "eot" else "!"
    special = {
        "bos_token": _added("<|startoftext|>"),
        "eos_token": _added("<|endoftext|>"),
        "unk_token": _added("<|endoftext|>"),
        "pad_token": pad,
    }
    settings = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": config.context_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    atomic_write_text(folder / "vocab.json", json.dumps(vocabulary(), ensure_ascii=False))
    atomic_write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges(), ""]))
    atomic_write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")
    atomic_write_text(folder / "special_tokens_map.json", json.dumps(special, indent=1) + "\n")


def _added(content: str) -> dict[str, object]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
