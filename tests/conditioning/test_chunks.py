"""Prompts with weights and of any length, as one tower encodes them."""

from __future__ import annotations

import random
import time

import pytest
import torch
from torch import Tensor

from ldm.adapters.textual_inversion import Embedding, TowerWithWords
from ldm.api import LatentDiffusion
from ldm.conditioning import chunks
from ldm.conditioning.clip import END, START, TextTower
from ldm.jobs import Ask


@pytest.fixture
def tower(tiny_model: LatentDiffusion) -> TextTower:
    assert tiny_model.text is not None and tiny_model.text.config.context_length == 16
    return tiny_model.text


@torch.no_grad()
def context(tower: TextTower, prompt: str) -> Tensor:
    return chunks.encode(tower, chunks.read(tower, prompt))


def tokens(tower: TextTower, prompt: str) -> list[list[int]]:
    """Without start, end and padding."""
    return [row[1 : row.tolist().index(END)].tolist() for row in chunks.read(tower, prompt).tokens]


@pytest.mark.parametrize("prompt", ["a red cat", "a (red:1.0) cat", "a ([red]:1.1) cat", r"a red\ cat", ""])
@torch.no_grad()
def test_weight_one_everywhere_is_the_plain_encoding_bit_for_bit(tower: TextTower, prompt: str) -> None:
    assert torch.equal(context(tower, prompt), tower.encode(["a red cat" if prompt else ""]))


@torch.no_grad()
def test_a_weight_goes_from_the_empty_prompt_through_the_word_and_on(tower: TextTower) -> None:
    plain, empty = tower.encode(["a red cat"]), tower.encode([""])
    cat = torch.zeros(16, 1)
    cat[3] = 1  # start, a, red, cat
    for weight in (0.0, 0.5, 1.3, -1.0):
        expected = torch.lerp(plain, empty + weight * (plain - empty), cat)
        torch.testing.assert_close(context(tower, f"a red (cat:{weight})"), expected)
    whole = context(tower, "(a red cat:0)")
    torch.testing.assert_close(whole[:, 1:4], empty[:, 1:4])
    assert torch.equal(whole[:, 4:], plain[:, 4:])  # the end and the padding have weight 1


@torch.no_grad()
def test_a_long_prompt_is_read_in_chunks(tower: TextTower) -> None:
    words = ["cat", "red", "dog", "blue", "car"] * 6
    (one,) = tokens(tower, "cat")
    assert len(one) == 1
    found = tokens(tower, " ".join(words))
    assert [len(row) for row in found] == [14, 14, 2]
    whole = context(tower, " ".join(words))
    apart = tower.encode([" ".join(words[:14])]), tower.encode([" ".join(words[14:28])]), tower.encode(["blue car"])
    assert torch.equal(whole, torch.cat(apart, dim=1))
    assert torch.equal(context(tower, " ".join(words[:14]) + " BREAK a"), torch.cat([apart[0], tower.encode(["a"])], 1))


def test_where_chunks_end(tower: TextTower) -> None:
    assert tokens(tower, "red BREAK") == tokens(tower, "red") and len(tokens(tower, "BREAK red")) == 2
    assert len(tokens(tower, "red BREAK BREAK cat")) == 3 and tokens(tower, "red BREAK BREAK cat")[1] == []
    comma = tower.tokenizer().encode(",")
    behind_a_comma = tokens(tower, "cat " * 6 + ", " + "red " * 10)
    assert [len(row) for row in behind_a_comma] == [7, 10] and behind_a_comma[0][-1:] == comma
    assert [len(row) for row in tokens(tower, "cat " * 14 + ", " + "red " * 3)] == [14, 4]  # the comma comes too late
    assert [len(row) for row in tokens(tower, "cat " * 13 + ", red")] == [14, 1]


def test_the_comma_counts_near_the_end_alone(tiny_model: LatentDiffusion) -> None:
    from dataclasses import replace

    from conftest import TINY

    assert TINY.text is not None
    tower = TextTower(replace(TINY.text, context_length=32))
    assert [len(row) for row in tokens(tower, "cat, " + "red " * 40)][:2] == [30, 12]
    assert [len(row) for row in tokens(tower, "cat " * 10 + ", " + "red " * 30)] == [11, 30]


def test_a_word_of_a_textual_inversion_is_not_cut(tower: TextTower) -> None:
    knowing = TowerWithWords(tower, [Embedding("<thing>", torch.randn(5, 32))])
    rows = tokens(knowing, "cat " * 12 + "<thing> dog")
    assert [len(row) for row in rows] == [12, 6]
    long = TowerWithWords(tower, [Embedding("<thing>", torch.randn(20, 32))])
    assert [len(row) for row in tokens(long, "<thing>")] == [14, 6]  # it does not fit as a whole
    assert torch.equal(context(knowing, "a (<thing>:1)"), knowing.encode(["a <thing>"]))


def test_there_is_an_end_to_what_is_read(tower: TextTower) -> None:
    read = chunks.read(tower, "cat " * 600)
    assert read.tokens.shape == (chunks.LONGEST, 16) and read.dropped == 600 - 14 * chunks.LONGEST
    assert bool((read.tokens[:, 0] == START).all())


def test_a_word_of_a_hundred_thousand_letters_takes_no_minutes(tower: TextTower) -> None:
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    before = time.process_time()
    assert tokens(tower, f"{letters} cat")[0] == tower.tokenize([letters])[0][0, 1:15].tolist()
    assert time.process_time() - before < 5  # of minutes


@torch.no_grad()
def test_the_encoder_reads_as_an_ask_says(tiny_model: LatentDiffusion) -> None:
    encoder, prompt = tiny_model.encoder, "a (cat:1.3) BREAK dog"
    plain, weighted = encoder([Ask(prompt)]), encoder([Ask(prompt, weighted=True)])
    assert plain.context.shape == (1, 16, 32) and weighted.context.shape == (1, 32, 32)
    both = encoder([Ask(prompt, weighted=True), Ask("", weighted=True)])
    assert both.mask.sum(dim=1).tolist() == [32, 16]
    assert torch.equal(both.context[:1], weighted.context)
    assert torch.equal(both.context[1:, :16], encoder([Ask("")]).context)


def test_what_is_said_of_such_prompts(tiny_model: LatentDiffusion) -> None:
    notices = tiny_model.encoder.notices
    assert not notices(["cat " * 100], weighted=True) and "dropped" in notices(["cat " * 100])[0]
    assert "dropped: its last" in notices(["cat " * 600], weighted=True)[0]
    assert "does not change" in notices(["a [cat:dog:0.5]"], weighted=True)[0] and not notices(["a [cat:dog:0.5]"])
    (unknown,) = notices(["a (zebrafish:1.2)"], weighted=True)
    assert "'zebrafish'" in unknown
