"""Tokens and padding equal those of Hugging Face's CLIPTokenizer, on prompts that are no pleasure."""

from __future__ import annotations

import pytest
import torch

from ldm.conditioning.clip import TextTower
from ldm.config import TextConfig

from . import stable_diffusion as sd

PROMPTS = [
    "",
    " ",
    "\n\t\u2003\u00a0 \x0b\x0c\x85\u2028",
    "  a  red\theart\n",
    "A RED HEART, It'S THEY'RE we'd I'll",
    "&amp; &lt;b&gt; &amp;amp; &#233; &nbsp;",
    "don’t “quote” — it’s schÃ¶n",
    "héllo he\u0301llo \u212b Å ﬁ",
    "ΣΊΣΥΦΟΣ ς İstanbul ß ẞ Ǆ",
    "日本語 猫 한국어 \u1112\u1161\u11ab العربية עברית हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ 🇩🇪 \U0001fae0",
    "1234 ½ ² ٣ ⅷ 3.14e-5",
    "a_b-c.d!!??...'''\"\"\" #@%$^&*()[]{}",
    "a\x00b\x1cc\u200bd\ufeffe\ud7ff",
    "<|endoftext|> b <|startoftext|>!<|ENDOFTEXT|> <start_of_text> <end_of_text>",
    "x" * 400,
    "word " * 90,
    "supercalifragilisticexpialidocious " * 12,
    "猫" * 100,
    "!" * 80,
    "(masterpiece:1.2), ((best quality)), [bad]",
]


@pytest.mark.parametrize(("version", "padding"), [(1, "eot"), (2, "zero")])
def test_tokens_equal_hugging_face(version: int, padding: str):
    sd.peers()
    theirs = sd.tokenizer(version)
    config = TextConfig(width=16, heads=1, layers=1, embed_dim=0, padding=padding, cleaning="plain")
    with torch.device("meta"):
        tower = TextTower(config)
    tokens, dropped = tower.tokenize(PROMPTS)
    wanted = theirs(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    for prompt, ours, expected in zip(PROMPTS, tokens, wanted, strict=True):
        assert ours.tolist() == expected.tolist(), prompt[:60]
    too_long = [len(ids) > 77 for ids in theirs(PROMPTS).input_ids]
    assert [bool(words) for words in dropped] == too_long and sum(too_long) >= 4
