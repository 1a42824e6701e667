"""What a picture is called: Unicode's names and keywords for emoji, cleaned file names for the rest, and the article.

Caption recipe: `"{a name}, {style}"`; json["captions"] adds `"{style} of {a name}"`, `"{name}"` and, where the
annotations know more words, `"{name}, {keywords}, {style}"`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


def words(text: str) -> frozenset[str]:
    """A list of words that is written as prose."""
    return frozenset(text.split())


TONES = ("medium-light", "medium-dark", "light", "medium", "dark")
_TONE_MODIFIERS = frozenset(range(0x1F3FB, 0x1F400))
_SELECTOR = 0xFE0F  # variation selector 16, "draw it as a picture": some sets write it, some do not
_KEYWORDS = 8  # kept in the json
_KEYWORDS_IN_CAPTION = 3


@dataclass(frozen=True)
class Emoji:
    """One emoji as Unicode describes it. `tones` counts its different skin tones."""

    name: str
    keywords: tuple[str, ...]
    group: str
    tones: int


class EmojiNames:
    """Emoji by code points ("1f9d1-200d-2696") or by the slug of their name ("judge").

    Variation selectors do not count. `vocabulary`: the words of names and keywords, flags and
    proper names aside.
    """

    def __init__(self, emojis: dict[str, Emoji], slugs: dict[str, str]) -> None:
        self._emojis = emojis
        self._slugs = slugs
        self._squashed = {slug.replace("-", ""): points for slug, points in slugs.items()}
        self.vocabulary = frozenset(
            word
            for emoji in emojis.values()
            if emoji.group != "Flags"
            for phrase in (emoji.name, *emoji.keywords)
            for word in re.findall(r"\b[a-z]+", phrase)
        )

    @classmethod
    def read(cls, annotations: Path, derived: Path, groups: Path) -> EmojiNames:
        """From the folders of cldr-annotations-full, cldr-annotations-derived-full and unicode-emoji-json."""
        cldr = json.loads((annotations / "annotations/en/annotations.json").read_text(encoding="utf-8"))
        more = json.loads((derived / "annotationsDerived/en/annotations.json").read_text(encoding="utf-8"))
        entries = {**more["annotationsDerived"]["annotations"], **cldr["annotations"]["annotations"]}
        ordered = json.loads((groups / "data-by-emoji.json").read_text(encoding="utf-8"))
        group_of = {code_points(text): about["group"] for text, about in ordered.items()}
        emojis: dict[str, Emoji] = {}
        slugs: dict[str, str] = {}
        for text, entry in sorted(entries.items()):
            points = code_points(text)
            spoken = entry["tts"][0]
            tones = len(_TONE_MODIFIERS.intersection(int(point, 16) for point in points.split("-")))
            group = group_of.get(_without_tones(points), "")
            if not group:
                continue  # CLDR also names punctuation and mathematical signs, which no emoji set draws
            emojis[points] = Emoji(tidy(spoken), tuple(entry.get("default", ())), group, tones)
            if spoken in ("keycap: #", "keycap: *"):
                continue  # nothing of the sign is left in a slug
            for name in (spoken, emojis[points].name):
                slugs.setdefault(slug(name), points)
                slugs.setdefault(slug(name.replace("&", "and")), points)
        for text, about in ordered.items():
            if code_points(text) in emojis:
                slugs.setdefault(slug(about["name"]), code_points(text))
        return cls(emojis, slugs)

    def by_code_points(self, points: str) -> Emoji | None:
        """`points`: lower-case hexadecimal numbers joined by dashes."""
        return self._emojis.get("-".join(f"{int(p, 16):x}" for p in points.split("-") if int(p, 16) != _SELECTOR))

    def by_slug(self, candidates: Iterable[str]) -> Emoji | None:
        """The first candidate that is an emoji's slug; sets differ in small ways, which are tried in turn."""
        for candidate in candidates:
            for spelling in _spellings(candidate):
                points = self._slugs.get(spelling)
                if points is not None:
                    return self._emojis[points]
                if re.fullmatch(r"letter-[a-z]", spelling):
                    return Emoji(f"letter {spelling[-1].upper()}", (), "Symbols", 0)
        return None

    def by_squashed(self, text: str) -> Emoji | None:
        """For sets that name files without separators: "crescentmoon", "angry" (the face)."""
        text = text.replace("-", "")
        points = self._squashed.get(text) or self._squashed.get(f"{text}face")
        return self._emojis[points] if points is not None else None


def code_points(text: str) -> str:
    """'❤️' -> '2764': hexadecimal, dashes between, without variation selector 16."""
    return "-".join(f"{ord(character):x}" for character in text if ord(character) != _SELECTOR)


def _without_tones(points: str) -> str:
    return "-".join(point for point in points.split("-") if int(point, 16) not in _TONE_MODIFIERS)


def slug(name: str) -> str:
    """'Woman: dark skin tone, red hair' -> 'woman-dark-skin-tone-red-hair'; accents and apostrophes are dropped."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name.lower()) if not unicodedata.combining(c))
    return "-".join(re.findall(r"[a-z0-9]+", re.sub(r"['’.]", "", plain)))


_RENAMED = {  # what older sets call it -> what Unicode calls it today
    "hugging-face": "smiling-face-with-open-hands",
    "pouting-face": "enraged-face",
    "exclamation-mark": "red-exclamation-mark",
    "question-mark": "red-question-mark",
    "up-exclamation-button": "up-button",
}


def _spellings(text: str) -> list[str]:
    """A slug and what other sets write for the same thing: '-dark' for a skin tone, 'flag-for-', a running number."""
    bare = re.sub(r"-\d+$", "", text)
    found = [text, bare, text.replace("flag-for-", "flag-"), _RENAMED.get(text, text)]
    for ending in TONES:
        if text.endswith(f"-{ending}"):
            match = re.fullmatch(
                r"(.+?)(-facing-right|-beard|-(?:blond|red|curly|white)-hair|-bald)?", text.removesuffix(f"-{ending}")
            )
            if match:
                found.append(f"{match[1]}-{ending}-skin-tone{match[2] or ''}")
            break  # TONES has the longer names first
    return [*found, f"flag-{bare}"]


_PERSONS = words("man woman person boy girl child adult")


def tidy(spoken: str) -> str:
    """CLDR's spoken name as a phrase: 'woman: dark skin tone, red hair' -> 'woman with dark skin tone and red hair'."""
    spoken = spoken.replace("’", "'").replace("“", "").replace("”", "")
    head, colon, rest = spoken.partition(": ")
    if not colon:
        return spoken
    if head == "flag":
        return f"flag of {rest}"
    if head == "keycap":
        return f"keycap {rest}"
    parts = rest.split(", ")
    if _PERSONS.intersection(parts):
        return f"{head} with {rest}"  # family with man, woman, girl
    traits = " and ".join(
        "a beard" if part == "beard" else part for part in parts if part not in ("bald", "facing right")
    )
    before = "bald " if "bald" in parts else ""
    after = " facing right" if "facing right" in parts else ""
    return f"{before}{head}{f' with {traits}' if traits else ''}{after}"


# ---------------------------------------------------------------- the article

_NO_ARTICLE = words(  # adjectives, verbs, times, and names of activities
    """unlocked locked dizzy radioactive biohazard wireless foggy copyright registered divide multiply plus minus om
    infinity information customs construction cooking camping bowling tennis badminton lacrosse cricket wedding
    vibration dashing zzz mate sake oden dna luggage sushi ping-pong"""
)
_MASS = words(
    """bacon bread butter cheese salt soap rice water milk spaghetti popcorn fire fog ice wood yarn thread garlic
    broccoli coral money food hockey polo litter luggage voltage meat poo jewelry seaweed kelp grass lightning music
    hair smoke sand snow rain art electricity tea coffee wine beer sugar pasta honey mail e-mail jam soup confetti
    furniture clothing gold silver bronze paper oxygen"""
)
_PLURAL_WORDS = words("people men women children mice teeth feet geese oxen")
_SINGULAR_S = words("lens canvas atlas gas christmas chess news bias pancreas tennis rhinoceros")
_PLURAL_S = words("skis taxis menus kiwis emus gnus")
_BREAKS = words("of with in on at from behind without and to for over under")
_PROPER = frozenset({"mount fuji", "Tokyo tower", "horse racing"})
_THE = ("Statue of Liberty", "flag of ")


def article(name: str) -> str:
    """What a picture's name takes: 'a', 'an', 'the', or '' (plurals, mass nouns, adjectives, times, proper names)."""
    if name.startswith(_THE):
        return "the"
    parts = name.split()
    if not parts or name in _PROPER or name.startswith(("no ", "input ", "a ", "an ", "the ")):
        return ""
    if "o'clock" in name or name.endswith("-thirty") or name.startswith("keycap"):
        return ""
    head = _head(parts)
    if head[0].isupper() and not _is_initialism(head):
        return ""  # Santa Claus, Pisces
    if (
        parts[0] in _PLURAL_WORDS
        or head in _PLURAL_WORDS
        or name in _NO_ARTICLE
        or name.replace(" ", "-") in _NO_ARTICLE
    ):
        return ""
    if head in _MASS or head in _NO_ARTICLE or _is_plural(head):
        return ""
    return "an" if _vowel_sound(parts[0]) else "a"


def with_article(name: str) -> str:
    """'red apple' -> 'a red apple', 'eyes' -> 'eyes'."""
    found = article(name)
    return f"{found} {name}" if found else name


def _head(parts: Sequence[str]) -> str:
    """The noun the phrase is about: the last word before the first preposition, participle or bracket."""
    if "face" in parts:
        return "face"
    for index, word in enumerate(parts):
        if index and (word in _BREAKS or word.endswith("ing") or word.startswith("(")):
            return parts[index - 1].rstrip(",")
    return parts[-1]


def _is_initialism(word: str) -> bool:
    return word.isupper() or word == "T-Rex"


def _is_plural(word: str) -> bool:
    if word in _PLURAL_S:
        return True
    return word.endswith("s") and not word.endswith(("ss", "us", "is", "'s", "wards")) and word not in _SINGULAR_S


def _vowel_sound(word: str) -> bool:
    first = re.split(r"[-!]", word)[0]
    spelled = len(first) == 1 or (first.isupper() and not re.search("[AEIOU]", first[1:])) or first in ("SOS", "UFO")
    if spelled:
        return first[0].lower() in "aefhilmnorsx8"  # an ATM sign, an x-ray, a t-shirt; an 8 ball
    word = word.lower()
    if re.match(r"uni(?!n|m)|use|usu|utensil|utility|ukulele|eu|ewe|one\b|once", word):
        return False
    return bool(re.match(r"[aeiou]|hour|honest|honou?r|heir|11|18|8", word))


# ---------------------------------------------------------------- captions


def caption_keywords(name: str, keywords: Sequence[str]) -> tuple[str, ...]:
    """Up to three keywords that say more than the name does."""
    fresh = [
        word for word in keywords if word.lower() not in name.lower() and re.fullmatch(r"[A-Za-z][A-Za-z -]*", word)
    ]
    return tuple(fresh[:_KEYWORDS_IN_CAPTION])


def captions(name: str, phrase: str, style: str, keywords: Sequence[str]) -> list[str]:
    """The main caption first, then the alternatives. `phrase` is the name as a sentence has it, with its article."""
    found = [f"{phrase}, {style}", f"{style} of {phrase}", name]
    extra = caption_keywords(name, keywords)
    if extra:
        found.append(f"{name}, {', '.join(extra)}, {style}")
    return found


def shown_keywords(keywords: Sequence[str]) -> list[str]:
    """The keywords that the json keeps."""
    return list(keywords[:_KEYWORDS])
