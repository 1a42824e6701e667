"""DiceBear's parametric people -> `Drawing`s whose captions say exactly what was asked of the generator.

Each avatar's options come from its own number, so the set is the same on every machine. Personas' skin is drawn half
transparent, so captions name a skin tone for toon-head alone; a personas cap or beanie has one fixed colour.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .compose import a
from .drawings import Drawing
from .fetch import Unavailable

CORE = ("@dicebear/core", "9.4.3")
COUNT = 3000  # avatars of each style; pairs that differ in a detail alone go as near-duplicates later
_SCRIPT = Path(__file__).with_name("avatars.mjs")

_HAIR_COLOURS = {
    "black": "2c1b18", "brown": "724133", "blond": "e8c170", "red": "c9442e", "gray": "9a9a9a", "white": "f0ede6",
    "pink": "ec6fa8", "blue": "3f7fe0", "green": "3d9b56", "purple": "8a4fd0",
}  # fmt: skip
_CLOTHES_COLOURS = {
    "red": "dc2626", "orange": "f97316", "yellow": "facc15", "green": "22a04b", "blue": "2563eb", "purple": "7e22ce",
    "pink": "f48fb1", "gray": "8a8a8a", "black": "1c1c1c", "white": "f4f4f4",
}  # fmt: skip
_BACKGROUNDS = {
    "red": "ef9a9a", "orange": "ffcc80", "yellow": "fff59d", "green": "a5d6a7", "blue": "90caf9", "purple": "ce93d8",
    "pink": "f8bbd0", "gray": "cfcfcf", "white": "ffffff",
}  # fmt: skip

_PERSONAS_HAIR = {  # "{}" takes the colour; cuts whose colour does not show (buzz cut, fade) are left out
    "long": "with long {} hair", "extraLong": "with very long {} hair", "sideShave": "with side-shaved {} hair",
    "shortCombover": "with short combed {} hair", "curlyHighTop": "with a {} curly high top",
    "bobCut": "with a {} bob cut", "bobBangs": "with a {} bob with bangs", "curly": "with curly {} hair",
    "pigtails": "with {} pigtails", "curlyBun": "with a {} curly bun", "straightBun": "with a {} bun",
    "mohawk": "with a {} mohawk", "balding": "with balding {} hair", "bald": "with a bald head", "cap": "with a cap",
    "beanie": "with a beanie",
}  # fmt: skip
_PERSONAS_BEARD = {"walrus": "a walrus mustache", "goatee": "a goatee"}
_PERSONAS_MOUTH = {
    "smile": "smiling", "bigSmile": "with a big smile", "frown": "frowning", "surprise": "surprised",
    "smirk": "smirking", "lips": "with full lips", "pacifier": "with a pacifier",
}  # fmt: skip
_PERSONAS_EYES = {"open": "", "happy": "", "glasses": " and glasses", "sunglasses": " and sunglasses"}

_TOON_HAIR = {
    "sideComed": "with side-combed {} hair", "undercut": "with undercut {} hair", "spiky": "with spiky {} hair",
    "bun": "with a {} bun",
}  # fmt: skip
_TOON_BEARD = {"moustacheTwirl": "a twirled mustache", "fullBeard": "a full beard", "longBeard": "a long beard"}
_TOON_MOUTH = {"laugh": "laughing", "angry": "angry", "agape": "mouth agape", "smile": "smiling", "sad": "sad"}
_TOON_BROWS = {"angry": "angry", "sad": "sad"}
_TOON_CLOTHES = {
    "turtleNeck": "turtleneck", "openJacket": "open jacket", "dress": "dress", "shirt": "shirt", "tShirt": "t-shirt",
}  # fmt: skip
_TOON_SKIN = {"light": "f1c3a5", "medium": "b98e6a", "dark": "5c3829"}


def read_avatars(key: str, packages: Sequence[Path], style: str, count: int = COUNT) -> Iterator[Drawing]:
    """`count` avatars of one style. `packages`: the unpacked core and style. Raises Unavailable without Node."""
    people = [_PEOPLE[key](random.Random(f"{key}-{number}")) for number in range(count)]
    svgs = _draw(key, [options for options, _, _ in people], packages)
    for number, ((_, person, scene), svg) in enumerate(zip(people, svgs, strict=True)):
        whole = f"{person}, {scene}"
        phrases = (whole, f"{style} of {whole}", person)
        yield Drawing(key, f"{key}-{number}", whole, (), False, svg=svg, phrases=phrases)


def _draw(key: str, avatars: Sequence[dict[str, Any]], packages: Sequence[Path]) -> list[str]:
    node = shutil.which("node")
    if node is None:
        raise Unavailable("Node.js is not installed")
    asked = json.dumps({"style": key, "avatars": avatars})
    with tempfile.TemporaryDirectory() as folder:
        for package in packages:  # copies: Node looks for a package's own imports from where its files really are
            name = json.loads((package / "package.json").read_text(encoding="utf-8"))["name"]
            shutil.copytree(package, Path(folder, "node_modules", name))
        done = subprocess.run([node, str(_SCRIPT)], input=asked, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error" in line] or ["no message"]
        raise Unavailable(f"Node.js could not draw them: {said[0].strip()}")
    return json.loads(done.stdout)


Person = tuple[dict[str, Any], str, str]  # options, "a person with ...", "on a ... background"


def _persona(rng: random.Random) -> Person:
    hair, colour = rng.choice(list(_PERSONAS_HAIR)), rng.choice(list(_HAIR_COLOURS))
    shirt, ground = rng.choice(list(_CLOTHES_COLOURS)), rng.choice(list(_BACKGROUNDS))
    eyes, mouth = rng.choice(list(_PERSONAS_EYES)), rng.choice(list(_PERSONAS_MOUTH))
    beard = rng.choice(list(_PERSONAS_BEARD)) if rng.random() < 0.15 and mouth != "pacifier" else ""
    options = {
        "hair": [hair],
        "hairColor": [_HAIR_COLOURS[colour]],
        "facialHair": [beard or "goatee"],
        "facialHairProbability": 100 if beard else 0,
        "clothingColor": [_CLOTHES_COLOURS[shirt]],
        "body": [rng.choice(["squared", "rounded", "small"])],
        "nose": [rng.choice(["mediumRound", "smallRound"])],
        "eyes": [eyes],
        "mouth": [mouth],
        "skinColor": [rng.choice(["eeb4a4", "e5a07e", "b16a5b", "623d36"])],
        "backgroundColor": [_BACKGROUNDS[ground]],
    }
    looks = _PERSONAS_HAIR[hair].format(colour) + (f" and {_PERSONAS_BEARD[beard]}" if beard else "")
    wearing = f"wearing {a(shirt)} shirt{_PERSONAS_EYES[eyes]}"
    return options, f"a person {_agree(looks)} {wearing}, {_PERSONAS_MOUTH[mouth]}", f"on {a(ground)} background"


def _toon(rng: random.Random) -> Person:
    hair, colour = rng.choice(list(_TOON_HAIR)), rng.choice(list(_HAIR_COLOURS))
    clothes, shirt = rng.choice(list(_TOON_CLOTHES)), rng.choice(list(_CLOTHES_COLOURS))
    mouth, skin, ground = rng.choice(list(_TOON_MOUTH)), rng.choice(list(_TOON_SKIN)), rng.choice(list(_BACKGROUNDS))
    beard = rng.choice(list(_TOON_BEARD)) if rng.random() < 0.15 and clothes != "dress" else ""
    options = {
        "hair": [hair],
        "hairColor": [_HAIR_COLOURS[colour]],
        "rearHairProbability": 0,
        "beard": [beard or "fullBeard"],
        "beardProbability": 100 if beard else 0,
        "clothes": [clothes],
        "clothesColor": [_CLOTHES_COLOURS[shirt]],
        "eyebrows": [_TOON_BROWS.get(mouth, "neutral")],
        "eyes": [rng.choice(["happy", "wide", "humble"])],
        "mouth": [mouth],
        "skinColor": [_TOON_SKIN[skin]],
        "backgroundColor": [_BACKGROUNDS[ground]],
    }
    looks = _TOON_HAIR[hair].format(colour) + (f" and {_TOON_BEARD[beard]}" if beard else "")
    person = f"a person {_agree(looks)} wearing {a(shirt)} {_TOON_CLOTHES[clothes]}, {_TOON_MOUTH[mouth]}"
    return options, f"{person}, {skin} skin tone", f"on {a(ground)} background"


_PEOPLE = {"personas": _persona, "toon-head": _toon}


def _agree(looks: str) -> str:
    """'with a orange bun' -> 'with an orange bun'."""
    return looks.replace(" a orange", " an orange")
