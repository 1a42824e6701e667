"""Synthetic packages in npm's layout, an `npm` that packs them, and readers of what is built from them."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

# character, spoken name, keywords, group
EMOJI = [
    ("🍎", "red apple", ["apple", "fruit", "red"], "Food & Drink"),
    ("🍕", "pizza", ["cheese", "food", "hungry", "slice"], "Food & Drink"),
    ("🚗", "automobile", ["car", "driving", "vehicle"], "Travel & Places"),
    ("🦉", "owl", ["bird", "wise"], "Animals & Nature"),
    ("🐌", "snail", ["animal", "garden"], "Animals & Nature"),
    ("😀", "grinning face", ["happy", "smile"], "Smileys & Emotion"),
    ("👋", "waving hand", ["hello", "wave"], "People & Body"),
    ("🖕", "middle finger", ["hand"], "People & Body"),
    ("🍺", "beer mug", ["bar", "drink"], "Food & Drink"),
    ("🕘", "nine o’clock", ["clock", "time"], "Travel & Places"),
]
TONES = "🏻🏼🏽🏾🏿"
TONE_NAMES = ("light", "medium-light", "medium", "medium-dark", "dark")


def drawing(number: int, colour: str = "") -> dict[str, object]:
    """An icon that differs from those of other numbers by far more than near-duplicates do."""
    colour = colour or f"hsl({number * 47 % 360},80%,{35 + number * 13 % 40}%)"
    x, y = 4 + number * 5 % 14, 4 + number * 7 % 14
    body = f'<circle cx="16" cy="16" r="13" fill="{colour}"/><rect x="{x}" y="{y}" width="11" height="8" fill="#222"/>'
    return {"body": body}


def points(character: str) -> str:
    return "-".join(f"{ord(one):04x}" for one in character)


class Registry:
    """Package folders below `root`, and in `bin` an `npm` that packs them and logs each request."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.log = root / "registry", root / "bin", root / "npm.log"
        self.bin.mkdir(parents=True)
        self.root.mkdir()
        self.offline = root / "offline"
        script = f"""#!/bin/sh
test "$1 $3" = "pack --pack-destination" || exit 9
echo "$2" >> "{self.log}"
if [ -e "{self.offline}" ]; then echo "npm error code ENOTFOUND" >&2; exit 1; fi
cp "{self.root}/$(echo "$2" | tr / _).tgz" "$4" 2> "{self.log}.err" && exit 0
echo "npm error code E404" >&2; echo "npm error 404 Not Found" >&2; exit 1
"""
        npm = self.bin / "npm"
        npm.write_text(script)
        npm.chmod(npm.stat().st_mode | stat.S_IXUSR)

    def add(self, name: str, version: str, files: Mapping[str, bytes]) -> None:
        path = self.root / f"{name.replace('/', '_')}@{version}.tgz"
        with tarfile.open(path, "w:gz") as archive:
            for inside, content in {**files, "package.json": json.dumps({"name": name}).encode()}.items():
                info = tarfile.TarInfo(f"package/{inside}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))

    def requests(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def path(self) -> str:
        """A PATH with this npm first."""
        return f"{self.bin}{os.pathsep}{os.environ['PATH']}"


def iconify(icons: Mapping[str, dict[str, object]], chars: Mapping[str, str], **more: object) -> dict[str, bytes]:
    files = {"icons.json": json.dumps({"prefix": "x", "width": 32, "height": 32, "icons": icons, **more}).encode()}
    return files | ({"chars.json": json.dumps(chars).encode()} if chars else {})


def fill(registry: Registry) -> None:
    """Unicode's annotations, noto, fluent-flat, fluent-3d, twemoji and game-icons, a dozen drawings each."""
    spoken = {character: {"default": words, "tts": [name]} for character, name, words, _ in EMOJI}
    toned = {
        f"👋{tone}": {"default": ["hello"], "tts": [f"waving hand: {name} skin tone"]}
        for tone, name in zip(TONES, TONE_NAMES, strict=True)
    }
    annotations = json.dumps({"annotations": {"annotations": spoken}}).encode()
    derived = json.dumps({"annotationsDerived": {"annotations": toned}}).encode()
    groups = {c: {"name": name.replace("’", "'"), "group": group} for c, name, _, group in EMOJI}
    registry.add("cldr-annotations-full", "48.2.0", {"annotations/en/annotations.json": annotations})
    registry.add("cldr-annotations-derived-full", "48.2.0", {"annotationsDerived/en/annotations.json": derived})
    registry.add("unicode-emoji-json", "0.9.0", {"data-by-emoji.json": json.dumps(groups).encode()})

    for number, (name, version) in enumerate([("noto", "1.2.9"), ("fluent-emoji-flat", "1.2.6"), ("twemoji", "1.2.5")]):
        icons = {slug(name): drawing(100 * number + i) for i, (_, name, _, _) in enumerate(EMOJI)}
        chars = {points(character): slug(name) for character, name, _, _ in EMOJI}
        for i, tone in enumerate(TONES):
            icons[f"waving-hand-{TONE_NAMES[i]}-skin-tone"] = drawing(3 * number, colour=f"hsl(30,50%,{85 - 15 * i}%)")
            chars[points(f"👋{tone}")] = f"waving-hand-{TONE_NAMES[i]}-skin-tone"
        icons["gone"] = drawing(50) | {"hidden": True}
        icons["mystery-thing"] = drawing(51)
        if name == "twemoji":
            icons["owl"] = drawing(3)  # noto's owl: a near-duplicate of a lower tier
        registry.add(f"@iconify-json/{name}", version, iconify(icons, chars))

    square = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
    square.paste((90, 20, 160, 255), (8, 8, 40, 40))
    out = io.BytesIO()
    square.save(out, "WEBP", lossless=True)
    registry.add("@lobehub/fluent-emoji-3d", "1.1.0", {"assets/1f34e.webp": out.getvalue(), "assets/1f355.webp": b"no"})

    silhouettes = {
        name: {"body": f'<path d="M2 2h{8 + 2 * i}v{26 - 2 * i}h-6z"/>'}
        for i, name in enumerate(["anchor", "axe-sword", "facebook-logo", "tavern-sign"])
    }
    registry.add("@iconify-json/game-icons", "1.2.4", iconify(silhouettes, {}))


def slug(name: str) -> str:
    return name.replace("’", "").replace(" ", "-")


# ---------------------------------------------------------------- what a build left


def samples(folder: Path) -> list[dict]:
    """Every sample of a folder of shards: members by extension, json parsed, and the shard's name."""
    found: dict[tuple[str, str], dict] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                key, extension = member.name.rsplit(".", 1)
                found.setdefault((path.name, key), {"shard": path.name})[extension] = file.read()
    for one in found.values():
        one["json"] = json.loads(one["json"])
    return list(found.values())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
