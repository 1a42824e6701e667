"""Names, articles, captions, filters, splits; clip art and avatars before they are rendered."""

from __future__ import annotations

import io
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from icons import avatars, captions, clipart, drawings, filters, rasterise
from icons.fetch import Unavailable


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("red apple", "a red apple"),
        ("eagle", "an eagle"),
        ("hourglass done", "an hourglass done"),
        ("unicorn", "a unicorn"),
        ("umbrella with rain drops", "an umbrella with rain drops"),
        ("ewe", "a ewe"),
        ("euro banknote", "a euro banknote"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("onion", "an onion"),
        ("ATM sign", "an ATM sign"),
        ("x-ray", "an x-ray"),
        ("t-shirt", "a t-shirt"),
        ("T-Rex", "a T-Rex"),
        ("SOS button", "an SOS button"),
        ("NEW button", "a NEW button"),
        ("face with tears of joy", "a face with tears of joy"),
        ("face savoring food", "a face savoring food"),
        ("man lifting weights", "a man lifting weights"),
        ("ear of corn", "an ear of corn"),
        ("octopus", "an octopus"),
        ("compass", "a compass"),
        ("rhinoceros", "a rhinoceros"),
        ("woman's boot", "a woman's boot"),
        ("rightwards pushing hand", "a rightwards pushing hand"),
        ("flag of Kuwait", "the flag of Kuwait"),
        ("Statue of Liberty", "the Statue of Liberty"),
        ("Christmas tree", "a Christmas tree"),
        # none
        ("nine-thirty", "nine-thirty"),
        ("two o'clock", "two o'clock"),
        ("locked", "locked"),
        ("eyes", "eyes"),
        ("french fries", "french fries"),
        ("scissors", "scissors"),
        ("skis", "skis"),
        ("people hugging", "people hugging"),
        ("busts in silhouette", "busts in silhouette"),
        ("bacon", "bacon"),
        ("cooked rice", "cooked rice"),
        ("tennis", "tennis"),
        ("Pisces", "Pisces"),
        ("Santa Claus", "Santa Claus"),
        ("mount fuji", "mount fuji"),
        ("no bicycles", "no bicycles"),
        ("keycap 3", "keycap 3"),
    ],
)
def test_articles(name, said):
    assert captions.with_article(name) == said


@pytest.mark.parametrize(
    ("spoken", "name"),
    [
        ("waving hand: medium-dark skin tone", "waving hand with medium-dark skin tone"),
        ("woman: dark skin tone, red hair", "woman with dark skin tone and red hair"),
        ("man: bald", "bald man"),
        ("man: light skin tone, bald", "bald man with light skin tone"),
        ("woman: beard", "woman with a beard"),
        ("person walking: facing right", "person walking facing right"),
        ("family: man, woman, girl", "family with man, woman, girl"),
        ("flag: Kuwait", "flag of Kuwait"),
        ("woman’s hat", "woman's hat"),
    ],
)
def test_spoken_names_become_phrases(spoken, name):
    assert captions.tidy(spoken) == name


def test_captions_and_keywords():
    said = captions.captions("judge", "a judge", "3d render", ("judge", "justice", "law", "143", "scales", "court"))
    assert said == [
        "a judge, 3d render",
        "3d render of a judge",
        "judge",
        "judge, justice, law, scales, 3d render",
    ]
    assert (
        len(captions.captions("rolled-up newspaper", "y", "x", ("news", "paper", "rolled"))) == 3
    )  # nothing new to say


def test_other_sets_spellings_are_understood():
    flag = captions.Emoji("flag of Fiji", (), "Flags", 0)
    toned = captions.Emoji("judge with dark skin tone", (), "People & Body", 1)
    names = captions.EmojiNames({"1": flag, "2": toned}, {"flag-fiji": "1", "judge-dark-skin-tone": "2"})
    assert names.by_slug(["flag-for-fiji"]) is flag and names.by_slug(["fiji"]) is flag
    assert names.by_slug(["judge-dark"]) is toned and names.by_slug(["judge-dark-skin-tone-2"]) is toned
    assert names.by_slug(["nothing"]) is None and names.by_squashed("flagfiji") is flag
    assert names.by_code_points("0001-fe0f") is flag


@pytest.mark.parametrize(
    ("name", "brand", "unfit", "sensitive"),
    [
        ("facebook logo", True, False, False),
        ("finn the human", True, False, False),
        ("steam locomotive", False, False, False),
        ("middle finger", False, True, False),
        ("beer mug", False, False, True),
        ("crossed swords", False, False, True),
        ("red apple", False, False, False),
        ("beeriness", False, False, False),  # whole words only
    ],
)
def test_word_lists(name, brand, unfit, sensitive):
    assert (filters.is_brand(name), filters.is_unfit(name), filters.is_sensitive(name)) == (brand, unfit, sensitive)


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("woman scientist with dark skin tone", "scientist"),
        ("man with light skin tone and blond hair", "person with blond hair"),
        ("woman’s clothes", "man's clothes"),
        ("a red apple", "red apple"),
    ],
)
def test_a_concept_is_the_same_whoever_and_whatever_tone(name, same):
    assert filters.concept(name) == filters.concept(same)


def test_a_name_of_nothing_but_a_person_stays():
    assert filters.concept("woman") == "woman" != filters.concept("man")


def test_splits_have_their_shares():
    names = [f"thing {random.Random(i).random()}" for i in range(20_000)]
    counts = Counter(filters.split(name, "noto") for name in names)
    assert counts["test_concept"] / 20_000 == pytest.approx(0.015, rel=0.2)
    assert counts["test_combo"] / 20_000 == pytest.approx(0.04, rel=0.2)
    assert "test_combo" not in {filters.split(name, None) for name in names}


def test_a_held_out_concept_is_held_out_in_every_style():
    held = [name for name in (f"thing {i}" for i in range(3000)) if filters.split(name, None) == "test_concept"]
    assert held and all(
        filters.split(name, family) == "test_concept" for name in held for family in ("noto", "twemoji")
    )


@pytest.mark.parametrize(
    ("name", "family", "split"),
    [
        ("ambulance", "noto", "test_concept"),
        ("locked", "fluent-flat", "test_combo"),
        ("microscope", "noto", "test_combo"),
        ("microscope", "fluent-flat", "train"),
        ("red heart", "noto", "train"),
    ],
)
def test_splits_never_move(name, family, split):
    """A golden on purpose: a model must not meet in training what another build of the set held out."""
    assert filters.split(name, family) == split


# ---------------------------------------------------------------- clip art

RDF = """<svg width="100pt" height="100pt" xmlns="http://www.w3.org/2000/svg" xmlns:rdf="r" xmlns:cc="c" xmlns:dc="d">
<metadata><rdf:RDF><cc:Work rdf:about=""><dc:title>{title}</dc:title><dc:subject><rdf:Bag><rdf:li>food</rdf:li>
</rdf:Bag></dc:subject><cc:license rdf:resource="http://web.resource.org/cc/{licence}"/></cc:Work></rdf:RDF></metadata>
{body}</svg>"""
RED = '<rect x="-30" y="10" width="120" height="60" fill="#d33"/>'  # beyond the page's left edge


def clip(title: str, licence: str = "PublicDomain", body: str = RED) -> str:
    return RDF.format(title=title, licence=licence, body=body)


def test_clip_art_needs_a_title_of_known_words_and_the_public_domain(tmp_path):
    root = tmp_path / clipart.FOLDER
    for path, svg in {
        "food/one.svg": clip("Red apple_01 by Somebody"),
        "food/two.svg": clip("mela rossa"),
        "food/three.svg": clip("red apple", licence="by-nc"),
        "food/four.svg": clip("drawing"),
        "signs_and_symbols/five.svg": clip("red apple"),
        "food/huge.svg": clip("red apple", body="<!--" + "x" * 700_000 + "-->"),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(svg)
    found = list(clipart.read_clipart("clipart", tmp_path, frozenset({"red", "apple", "drawing"})))
    assert [(one.id, one.name, one.keywords) for one in found] == [("food__one", "red apple", ("food",))]


def test_what_spills_over_its_page_is_drawn_whole():
    drawing = drawings.Drawing("clipart", "x", "box", (), False, svg=clip("box"), spill=True)
    webp = rasterise.render(drawing, 40)
    assert webp is not None
    alpha = np.asarray(Image.open(io.BytesIO(webp)))[..., 3]
    rows, columns = np.nonzero(alpha > 128)
    assert np.ptp(columns) + 1 == 40 and np.ptp(rows) + 1 == pytest.approx(20, abs=1)  # 120 by 60, in the middle
    assert abs(rows.min() - (39 - rows.max())) <= 1


def test_line_art_and_blank_pages_are_not_drawn():
    gray = clip("box", body='<rect width="60" height="60" fill="#444"/>')
    for svg, spill in ((gray, True), (clip("box", body=""), False), ("<svg", False)):
        drawing = drawings.Drawing("clipart", "x", "box", (), False, svg=svg, spill=spill)
        assert rasterise.render(drawing, 32) is None


def test_without_a_renderer_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(rasterise, "_engines", lambda: ())
    with pytest.raises(UserError, match=r"\[icons\]"):
        rasterise.render_all([], 32, tmp_path, 1)


def test_pictures_that_are_not_square_are_centred():
    for width, height, axis in ((40, 20, 0), (20, 40, 1)):
        page = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" {page}><rect width="{width}" height="{height}"/></svg>'
        webp = rasterise.render(drawings.Drawing("noto", "x", "box", (), False, svg=svg), 32)
        assert webp is not None
        picture = Image.open(io.BytesIO(webp))
        assert picture.size == (32, 32)
        filled = np.nonzero(np.asarray(picture)[..., 3])[axis]
        assert (filled.min(), filled.max()) == (8, 23)


# ---------------------------------------------------------------- avatars


@pytest.mark.parametrize("key", ["personas", "toon-head"])
def test_an_avatars_caption_says_what_was_asked_for(key):
    for number in range(300):
        options, person, scene = avatars._PEOPLE[key](random.Random(number))
        caption = f"{person}, {scene}"
        assert options == avatars._PEOPLE[key](random.Random(number))[0]
        grounds = {name for name, code in avatars._BACKGROUNDS.items() if [code] == options["backgroundColor"]}
        assert any(scene == f"on {'an' if name == 'orange' else 'a'} {name} background" for name in grounds)
        colours = {name for name, code in avatars._HAIR_COLOURS.items() if [code] == options["hairColor"]}
        assert any(name in caption for name in colours) or options["hair"][0] in ("bald", "cap", "beanie")
        assert ("sunglasses" in caption) == (options["eyes"] == ["sunglasses"])
        assert " a orange" not in caption and len(caption.split()) <= 32


def test_avatars_need_node(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"Node\.js is not installed"):
        list(avatars.read_avatars("personas", [], "avatar", count=1))


def test_node_gets_the_options_and_gives_svgs(tmp_path, monkeypatch):
    """With packages that only repeat what they were asked: the way there and back."""
    if avatars.shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    core, style = tmp_path / "core", tmp_path / "style"
    code = "export const createAvatar = (style, options) => ({ toString: () => style.mark + JSON.stringify(options) });"
    for folder, name, text in (
        (core, "core", code),
        (style, "personas", "import '@dicebear/core'; export const mark = '<svg>';"),
    ):
        folder.mkdir()
        about = {"name": f"@dicebear/{name}", "type": "module", "exports": "./index.js"}
        (folder / "package.json").write_text(json.dumps(about))
        (folder / "index.js").write_text(text)
    found = list(avatars.read_avatars("personas", [core, style], "avatar", count=3))
    assert [one.id for one in found] == ["personas-0", "personas-1", "personas-2"]
    assert found[0].svg.startswith("<svg>{") and '"backgroundColor"' in found[0].svg
    assert found[0].phrases[:2] == (found[0].name, f"avatar of {found[0].name}")
