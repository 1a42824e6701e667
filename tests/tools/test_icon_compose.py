"""What a composed picture shows is what its caption says, to the pixel."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from icons.compose import (
    BACKGROUNDS,
    PALETTE,
    RELATIONS,
    Sprite,
    inset,
    melts,
    on_background,
    pair,
    plain,
    tint,
)

SIDE = 64
seeds = st.integers(0, 10_000)


def sprite(name: str, colour: tuple[int, int, int], shape: str = "ellipse", style: str = "flat emoji") -> Sprite:
    """A shape that touches all four sides, as many emoji do."""
    picture = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    getattr(ImageDraw.Draw(picture), shape)((0, 0, SIDE - 1, SIDE - 1), fill=(*colour, 255))
    return Sprite(picture, name, f"a {name}", style)


APPLE, LEMON = sprite("apple", (200, 60, 60)), sprite("lemon", (240, 220, 60))
ANCHOR = sprite("anchor", (0, 0, 0), style="silhouette icon")


def border(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture)
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def test_plain_is_the_sprite_over_white():
    made = plain(APPLE)
    pixels = np.asarray(made.picture)
    assert made.caption == "a apple, flat emoji" and made.picture.mode == "RGB"
    assert tuple(pixels[0, 0]) == (255, 255, 255) and tuple(pixels[SIDE // 2, SIDE // 2]) == (200, 60, 60)


def test_a_phrase_without_style_stands_alone():
    assert plain(Sprite(APPLE.picture, "x", "a person on a red background")).caption == "a person on a red background"


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_the_border_is_the_named_colour_exactly(seed):
    made = on_background(APPLE, random.Random(seed))
    assert made is not None
    colour = re.search(r" on an? (.+) background, flat emoji$", made.caption)
    assert colour and colour[1] == made.settings["background"]
    assert (border(made.picture) == PALETTE[colour[1]]).all()


def test_all_other_backgrounds_come_up_and_those_it_melts_into_do_not():
    seen = {made.settings["background"] for seed in range(200) if (made := on_background(APPLE, random.Random(seed)))}
    refused = {name for name in BACKGROUNDS if melts(APPLE.picture, PALETTE[name])}
    assert "red" in refused and seen == set(BACKGROUNDS) - refused


def test_no_background_is_forced_on_an_object_that_melts_into_all():
    assert on_background(APPLE, random.Random(0), ["red"]) is None


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_each_colour_melts_into_itself_and_not_into_white(name):
    picture = sprite("thing", PALETTE[name]).picture
    assert melts(picture, PALETTE[name])
    assert not melts(picture, PALETTE["white"])


def test_a_tenth_of_the_object_may_have_the_colour():
    picture = sprite("thing", (255, 255, 255), "rectangle").picture
    ImageDraw.Draw(picture).rectangle((0, 0, SIDE - 1, 5), fill=(*PALETTE["red"], 255))
    assert not melts(picture, PALETTE["red"])
    ImageDraw.Draw(picture).rectangle((0, 0, SIDE - 1, 7), fill=(*PALETTE["red"], 255))
    assert melts(picture, PALETTE["red"])


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_pairs_lie_where_the_caption_says(seed):
    """Each sprite's pixels are wholly in its half: x for left and right, y for above and below."""
    made = pair(APPLE, LEMON, random.Random(seed))
    pixels = np.asarray(made.picture).astype(int)
    red = np.abs(pixels - (200, 60, 60)).sum(axis=-1) < 30
    yellow = np.abs(pixels - (240, 220, 60)).sum(axis=-1) < 30
    assert red.sum() > 100 and yellow.sum() > 100
    relation = made.settings["relation"]
    assert made.caption == f"a apple {relation} a lemon, flat emoji"
    axis = 1 if relation in ("to the left of", "to the right of") else 0
    first, second = np.nonzero(red)[axis], np.nonzero(yellow)[axis]
    if relation in ("to the right of", "below"):
        first, second = second, first
    assert first.max() < SIDE // 2 <= second.min()
    assert (border(made.picture) == 255).all()


def test_all_relations_come_up():
    assert {pair(APPLE, LEMON, random.Random(s)).settings["relation"] for s in range(50)} == set(RELATIONS)


def test_a_pair_keeps_the_sprites_proportions():
    tall = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    ImageDraw.Draw(tall).rectangle((24, 0, 39, 63), fill=(0, 120, 0, 255))  # 16 by 64
    made = pair(Sprite(tall, "tree", "a tree", "flat emoji"), LEMON, random.Random(0), ["to the left of"])
    rows, columns = np.nonzero(np.abs(np.asarray(made.picture).astype(int) - (0, 120, 0)).sum(axis=-1) < 30)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert height / width == pytest.approx(4, rel=0.15)


def test_a_pair_is_of_one_style():
    with pytest.raises(ValueError, match="one style"):
        pair(APPLE, ANCHOR, random.Random(0))


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_tints_have_the_named_colours_exactly(seed):
    made = tint(ANCHOR, random.Random(seed))
    said = re.fullmatch(r"an? (.+) anchor icon on an? (.+) background", made.caption)
    assert said and (said[1], said[2]) == (made.settings["colour"], made.settings["background"])
    pixels = np.asarray(made.picture)
    assert tuple(pixels[SIDE // 2, SIDE // 2]) == PALETTE[said[1]]
    assert (border(made.picture) == PALETTE[said[2]]).all()
    assert np.linalg.norm(np.subtract(PALETTE[said[1]], PALETTE[said[2]])) >= 100


def test_articles_of_colours():
    captions = {tint(ANCHOR, random.Random(seed)).caption for seed in range(300)}
    assert any(caption.startswith("an orange anchor icon") for caption in captions)
    assert not any(re.search(r"\ba orange|\ban [^aeiou]", caption) for caption in captions)


def test_the_generator_is_the_only_chance():
    for rng in (lambda: random.Random(7), lambda: np.random.default_rng(7)):
        for compose in (on_background, tint):
            first, second = compose(ANCHOR, rng()), compose(ANCHOR, rng())
            assert first and second and first.caption == second.caption
            assert first.picture.tobytes() == second.picture.tobytes()


def test_inset_leaves_a_transparent_frame():
    alpha = np.asarray(inset(APPLE.picture))[..., 3]
    assert alpha[0].max() == alpha[-1].max() == alpha[:, 0].max() == alpha[:, -1].max() == 0
    assert alpha[SIDE // 2, SIDE // 2] == 255
