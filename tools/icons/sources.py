"""Where the drawings come from: one row for each set.

tier 1: MIT, Apache-2.0, public domain. tier 2: also CC-BY, which needs an attribution. tier 3: also CC-BY-SA; whether
a model's weights are an adaptation of such pictures is unsettled, so these are an opt-in.
"""

from __future__ import annotations

from dataclasses import dataclass

ANNOTATIONS = ("cldr-annotations-full", "48.2.0")  # names and keywords, Unicode-3.0
DERIVED = ("cldr-annotations-derived-full", "48.2.0")
GROUPS = ("unicode-emoji-json", "0.9.0")  # MIT
NAMES = (ANNOTATIONS, DERIVED, GROUPS)


@dataclass(frozen=True)
class Source:
    """One set of pictures.

    `kind`: emoji or icon (an iconify package), files (pictures named by code points), clipart, avatar.
    """

    package: str
    version: str
    kind: str
    style: str  # the words captions name it by
    licence: str  # SPDX
    author: str
    link: str
    tier: int
    family: str | None = None  # emoji sets with the same drawings share one; None: no emoji
    mono: bool = False  # black silhouettes, to be tinted
    suffix: str = ""  # of an icon set, only the names that end so
    spelled_by: str = ""  # key of the source whose chars.json knows the code points of this one's names

    @property
    def optional(self) -> bool:
        """Needs Debian's or Node's tools; without them it drops out."""
        return self.kind in ("clipart", "avatar")


_GOOGLE = ("Apache-2.0", "Google Inc", "https://github.com/googlefonts/noto-emoji")
_MICROSOFT = ("MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji")
_ICONIFY = "@iconify-json/"
_DICEBEAR = "@dicebear/"

# The order matters: of two near-duplicates in one tier, the earlier source's stays.
SOURCES: dict[str, Source] = {
    "noto": Source(f"{_ICONIFY}noto", "1.2.9", "emoji", "noto emoji", *_GOOGLE, 1, "noto"),
    "fluent": Source(
        f"{_ICONIFY}fluent-emoji",
        "1.2.7",
        "emoji",
        "glossy emoji",
        *_MICROSOFT,
        1,
        "fluent",
        spelled_by="fluent-flat",
    ),
    "fluent-flat": Source(
        f"{_ICONIFY}fluent-emoji-flat", "1.2.6", "emoji", "flat emoji", *_MICROSOFT, 1, "fluent-flat"
    ),
    "fluent-3d": Source(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "files",
        "3d render",
        "MIT",
        "Microsoft Corporation (packed by LobeHub)",
        "https://github.com/microsoft/fluentui-emoji",
        1,
        "fluent",
    ),
    "noto-v1": Source(f"{_ICONIFY}noto-v1", "1.2.5", "emoji", "blob emoji", *_GOOGLE, 1, "noto-v1"),
    "fxemoji": Source(
        f"{_ICONIFY}fxemoji",
        "1.2.2",
        "emoji",
        "firefox emoji",
        "Apache-2.0",
        "Mozilla",
        "https://github.com/mozilla/fxemoji",
        1,
        "fxemoji",
    ),
    "ph-fill": Source(
        f"{_ICONIFY}ph",
        "1.2.2",
        "icon",
        "solid icon",
        "MIT",
        "Phosphor Icons",
        "https://github.com/phosphor-icons/core",
        1,
        mono=True,
        suffix="-fill",
    ),
    "meteocons": Source(
        f"{_ICONIFY}meteocons",
        "1.2.4",
        "icon",
        "weather icon",
        "MIT",
        "Bas Milius",
        "https://github.com/basmilius/weather-icons",
        1,
    ),
    "clipart": Source(
        "openclipart-svg",
        "1:0.18+dfsg-19",
        "clipart",
        "clip art",
        "public domain",
        "Open Clip Art Library",
        "https://openclipart.org",
        1,
    ),
    "twemoji": Source(
        f"{_ICONIFY}twemoji",
        "1.2.5",
        "emoji",
        "twemoji",
        "CC-BY-4.0",
        "Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
        2,
        "twemoji",
    ),
    "emojitwo": Source(
        f"{_ICONIFY}emojione",
        "1.2.3",
        "emoji",
        "emojitwo",
        "CC-BY-4.0",
        "EmojiTwo / Ranks.com",
        "https://github.com/EmojiTwo/emojitwo",
        2,
        "emojitwo",
    ),
    "sl-emojis": Source(
        f"{_ICONIFY}streamline-emojis",
        "1.2.4",
        "emoji",
        "outlined emoji",
        "CC-BY-4.0",
        "Streamline",
        "https://github.com/webalys-hq/streamline-vectors",
        2,
        "sl-emojis",
    ),
    "game-icons": Source(
        f"{_ICONIFY}game-icons",
        "1.2.4",
        "icon",
        "silhouette icon",
        "CC-BY-3.0",
        "game-icons.net authors",
        "https://github.com/game-icons/icons",
        2,
        mono=True,
    ),
    "personas": Source(
        f"{_DICEBEAR}personas",
        "9.4.3",
        "avatar",
        "avatar",
        "CC-BY-4.0",
        "Draftbit (via DiceBear)",
        "https://personas.draftbit.com",
        2,
    ),
    "toon-head": Source(
        f"{_DICEBEAR}toon-head",
        "9.4.3",
        "avatar",
        "cartoon avatar",
        "CC-BY-4.0",
        "Johan Melin (via DiceBear)",
        "https://www.johanmelin.com",
        2,
    ),
    "openmoji": Source(
        f"{_ICONIFY}openmoji",
        "1.2.29",
        "emoji",
        "openmoji",
        "CC-BY-SA-4.0",
        "OpenMoji",
        "https://openmoji.org",
        3,
        "openmoji",
    ),
    "emojione-v1": Source(
        f"{_ICONIFY}emojione-v1",
        "1.2.3",
        "emoji",
        "first emojione",
        "CC-BY-SA-4.0",
        "Emoji One",
        "https://github.com/joypixels/emojione-legacy",
        3,
        "emojione-v1",
    ),
}
