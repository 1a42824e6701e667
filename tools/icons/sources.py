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
_LOBEHUB = ("MIT", "Microsoft Corporation (packed by LobeHub)", "https://github.com/microsoft/fluentui-emoji")
_MOZILLA = ("Apache-2.0", "Mozilla", "https://github.com/mozilla/fxemoji")
_PHOSPHOR = ("MIT", "Phosphor Icons", "https://github.com/phosphor-icons/core")
_WEATHER = ("MIT", "Bas Milius", "https://github.com/basmilius/weather-icons")
_CLIPART = ("public domain", "Open Clip Art Library", "https://openclipart.org")
_TWITTER = ("CC-BY-4.0", "Twitter, Inc and other contributors", "https://github.com/jdecked/twemoji")
_EMOJITWO = ("CC-BY-4.0", "EmojiTwo / Ranks.com", "https://github.com/EmojiTwo/emojitwo")
_STREAMLINE = ("CC-BY-4.0", "Streamline", "https://github.com/webalys-hq/streamline-vectors")
_GAMES = ("CC-BY-3.0", "game-icons.net authors", "https://github.com/game-icons/icons")
_DRAFTBIT = ("CC-BY-4.0", "Draftbit (via DiceBear)", "https://personas.draftbit.com")
_MELIN = ("CC-BY-4.0", "Johan Melin (via DiceBear)", "https://www.johanmelin.com")
_OPENMOJI = ("CC-BY-SA-4.0", "OpenMoji", "https://openmoji.org")
_EMOJIONE = ("CC-BY-SA-4.0", "Emoji One", "https://github.com/joypixels/emojione-legacy")
_SET = "@iconify-json/"

# The order matters: of two near-duplicates in one tier, the earlier source's stays.
SOURCES: dict[str, Source] = {
    "noto": Source(f"{_SET}noto", "1.2.9", "emoji", "noto emoji", *_GOOGLE, 1, "noto"),
    "fluent": Source(
        f"{_SET}fluent-emoji", "1.2.7", "emoji", "glossy emoji", *_MICROSOFT, 1, "fluent", spelled_by="fluent-flat"
    ),
    "fluent-flat": Source(f"{_SET}fluent-emoji-flat", "1.2.6", "emoji", "flat emoji", *_MICROSOFT, 1, "fluent-flat"),
    "fluent-3d": Source("@lobehub/fluent-emoji-3d", "1.1.0", "files", "3d render", *_LOBEHUB, 1, "fluent"),
    "noto-v1": Source(f"{_SET}noto-v1", "1.2.5", "emoji", "blob emoji", *_GOOGLE, 1, "noto-v1"),
    "fxemoji": Source(f"{_SET}fxemoji", "1.2.2", "emoji", "firefox emoji", *_MOZILLA, 1, "fxemoji"),
    "ph-fill": Source(f"{_SET}ph", "1.2.2", "icon", "solid icon", *_PHOSPHOR, 1, mono=True, suffix="-fill"),
    "meteocons": Source(f"{_SET}meteocons", "1.2.4", "icon", "weather icon", *_WEATHER, 1),
    "clipart": Source("openclipart-svg", "1:0.18+dfsg-19", "clipart", "clip art", *_CLIPART, 1),
    "twemoji": Source(f"{_SET}twemoji", "1.2.5", "emoji", "twemoji", *_TWITTER, 2, "twemoji"),
    "emojitwo": Source(f"{_SET}emojione", "1.2.3", "emoji", "emojitwo", *_EMOJITWO, 2, "emojitwo"),
    "sl-emojis": Source(f"{_SET}streamline-emojis", "1.2.4", "emoji", "outlined emoji", *_STREAMLINE, 2, "sl-emojis"),
    "game-icons": Source(f"{_SET}game-icons", "1.2.4", "icon", "silhouette icon", *_GAMES, 2, mono=True),
    "personas": Source("@dicebear/personas", "9.4.3", "avatar", "avatar", *_DRAFTBIT, 2),
    "toon-head": Source("@dicebear/toon-head", "9.4.3", "avatar", "cartoon avatar", *_MELIN, 2),
    "openmoji": Source(f"{_SET}openmoji", "1.2.29", "emoji", "openmoji", *_OPENMOJI, 3, "openmoji"),
    "emojione-v1": Source(f"{_SET}emojione-v1", "1.2.3", "emoji", "first emojione", *_EMOJIONE, 3, "emojione-v1"),
}
