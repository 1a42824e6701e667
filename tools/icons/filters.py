"""What stays out of the set, and which split a picture belongs to.

Splits hang on a hash of the concept alone, so they survive re-ordering, new sources and another picture size:
- test_concept, 1.5 % of concepts: never trained in any style or source;
- test_combo, 4 % of (concept, emoji style family): the concept is trained in other styles.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

from .captions import TONES, words

_TEST_CONCEPT = 15  # of 1000
_TEST_COMBO = 40  # of 1000
_TONE_SHARE = 3  # one in so many single-tone variants is kept, else people would be half of the data

_TONE_PHRASE = re.compile(rf"( with| and) ({'|'.join(TONES)}) skin tone( and\b)?")
_PERSON_WORD = re.compile(r"\b(man|woman|person|men|women|people|male|female|boy|girl)('s|s)?\b")

# Names of companies, products, games and their characters, as whole words; any name with the word "logo" goes as well.
_BRANDS = words(
    """airbnb amazon android behance bitbucket bluetooth codepen codesandbox dig-dug digg discord docker dribbble
    dropbox ebay evernote facebook fediverse figma finn-the-human firefox flickr github gitlab gmail google
    harry-potter ikea instagram javascript kickstarter kindle kubernetes lego linkedin linux macos mastodon
    mcdonalds metroid microsoft minecraft mozilla netflix nintendo npm nvidia openai pacman pac-man paypal photoshop
    pinterest playstation pokemon reddit sega skype snapchat spotify tetris tiktok trello tumblr twitter ubuntu usb
    vimeo vue wechat whatsapp wikipedia wordpress xbox yahoo youtube zelda"""
)
_HARD = words(  # not drawn at all
    """nude naked nudity sex sexy erotic porn bikini-girl breast breasts penis vagina condom nazi swastika hitler kkk
    klansman genocide suicide hanged guillotine gallows torture corpse decapitation beheaded impaled
    pistol-whip middle-finger breast-feeding rape slave slavery"""
)
_SENSITIVE = words(  # drawn, and flagged
    """ak47 anthrax axe-sword beer blood blunt bomb bottle-of-vodka cannabis champagne cigar cigarette cocktail
    coffin dagger dynamite grenade gun handgun heroin knife machete marijuana missile musket pill pistol revolver rifle
    sake shotgun skull smoking sniper sword syringe tobacco tommy-gun uzi vodka weapon whiskey wine"""
)
_OBJECT_GROUPS = frozenset({"Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects"})


def _words(name: str) -> set[str]:
    """The words of a name, their singulars, and each two and three neighbours joined by a dash."""
    found = re.findall(r"[a-z0-9]+", name.lower())
    joined = ["-".join(found[i : i + n]) for n in (2, 3) for i in range(len(found) - n + 1)]
    return {*found, *(word.removesuffix("s") for word in found), *joined}


def is_brand(name: str) -> bool:
    """Logos and names of companies and products."""
    found = _words(name)
    return "logo" in found or not found.isdisjoint(_BRANDS)


def is_unfit(name: str) -> bool:
    """What the set does not draw at all."""
    return not _words(name).isdisjoint(_HARD)


def is_sensitive(name: str) -> bool:
    """Weapons, alcohol, tobacco, skulls: kept, flagged in the json."""
    return not _words(name).isdisjoint(_SENSITIVE)


def is_object(name: str, group: str, tones: int) -> bool:
    """Fit for backgrounds and pairs: an emoji of a thing, named in one or two words, that is no clock face."""
    clock = "o'clock" in name or name.endswith("-thirty")
    return group in _OBJECT_GROUPS and tones == 0 and len(name.split()) <= 2 and not clock


def keep_tone(source: str, identity: str, tones: int) -> bool:
    """All pictures without a skin tone, a third of those with one, none with two."""
    if tones == 0:
        return True
    return tones == 1 and _hash(f"t{source}{identity}") % _TONE_SHARE == 0


# ---------------------------------------------------------------- splits


def concept(name: str) -> str:
    """What the picture is of, whatever skin tone, gender or article: 'a woman scientist' -> 'scientist'."""
    text = _TONE_PHRASE.sub(lambda tone: " with" if tone[3] else "", name).lower().replace("&", "and").replace("’", "'")
    text = re.sub(r"^(a|an|the) ", "", text)
    neutral = _PERSON_WORD.sub(" ", text)
    text = neutral if neutral.strip(" -") else text
    return "-".join(re.findall(r"[a-z0-9]+", text.replace("'", "")))


def split(name: str, family: str | None) -> str:
    """'train', 'test_concept' or 'test_combo'. `family` is the emoji style family, None for what is no emoji."""
    key = concept(name)
    if _hash(f"c{key}") % 1000 < _TEST_CONCEPT:
        return "test_concept"
    if family is not None and _hash(f"p{key}{family}") % 1000 < _TEST_COMBO:
        return "test_combo"
    return "train"


def _hash(text: str) -> int:
    return int(hashlib.md5(text.encode()).hexdigest()[:8], 16)


# ---------------------------------------------------------------- near-duplicates

THUMBNAIL = 12  # pixels on a side; a plain difference hash would merge skin tones, a colour thumbnail does not
_RADIUS = 2.0  # of 255, root mean square over the thumbnail


def near_duplicates(thumbnails: np.ndarray) -> list[int]:
    """Indices to drop. `thumbnails` (N, 12, 12, 3) of 0..255 on white, best first: of two alike the earlier stays.

    Two pictures closer than r in RMSE differ in the mean of any channel by at most sqrt(3) r, so each is compared
    with the kept ones of 27 cells of a grid over the three means: exact, and far fewer than all pairs.
    """
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    side = np.sqrt(3.0) * _RADIUS
    cells = np.floor(thumbnails.reshape(len(thumbnails), -1, 3).mean(axis=1) / side).astype(int)
    kept: dict[tuple[int, int, int], list[int]] = {}
    dropped: list[int] = []
    around = [(i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]
    for index, (r, g, b) in enumerate(cells.tolist()):
        rivals = [other for i, j, k in around for other in kept.get((r + i, g + j, b + k), ())]
        if rivals and float(np.square(flat[rivals] - flat[index]).mean(axis=1).min()) < _RADIUS**2:
            dropped.append(index)
        else:
            kept.setdefault((r, g, b), []).append(index)
    return dropped
