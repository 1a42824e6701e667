"""The words of the commands that draw: one parser for all that they share, made of the fields of the settings.

No torch: what can be wrong without a model is found before it is imported, which takes seconds.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm import jobs
from ldm.arguments import Parser, add_fields, add_machine, taken
from ldm.backends import BACKENDS
from ldm.errors import UserError
from ldm.find import SHIPPED
from ldm.jobs import Beginning, Request, Settings
from ldm.jobs.adapters import Adapter, parse_embedding, parse_lora

REPRODUCIBLE = {
    "reproduce",
    "model",
    "vae",
    "set",
    "device",
    "precision",
    "attention",
    "backend",
    "low_memory",
    "out",
    "init",
    "mask",
    "depth",
}
"""Options that may stand beside --reproduce; all else is read in the picture."""


BATCH = (
    "of several, or of a folder, each is drawn, under its own name in --out, and what is there already is not drawn "
    "again"
)


def drawing_parser(about: str | None, prompts: str = "", seed: bool = True) -> Parser:
    """The parser of a command that draws; `about` is its file's docstring, examples behind the first paragraph.

    `prompts`: what a prompt is good for, where that is not plain; `seed`: whether it has --seed.
    """
    about, _, examples = (about or "").partition("\n\n")
    parser = Parser(description=about, epilog=examples)
    add = parser.add_argument_group("what to draw").add_argument
    add("--prompt", action="append", metavar="TEXT", help=prompts or "may be given several times")
    add(
        "--label", action="append", metavar="NAME", help="a class, of a model that has them; may be given several times"
    )
    add("--negative", metavar="TEXT", help="what not to draw (default: nothing in particular)")
    if seed:
        add("--seed", type=int, metavar="N", help="of the first picture; picture i has seed + i [0]")

    add = parser.add_argument_group("how to draw").add_argument
    add_fields(add, Settings, [field.name for field in dataclasses.fields(Settings) if field.name != "options"])
    add("--option", dest="options", action="append", metavar="NAME=VALUE", help="of the sampler; --list-samplers")
    add("--list-samplers", action="store_const", const=True, help="print the samplers and grids, a line each, and end")

    add = parser.add_argument_group("with what, and where to").add_argument
    kinds = "ours, diffusers, Stable Diffusion's .safetensors or .ckpt"
    add("--model", metavar="MODEL", help=f"{', '.join(SHIPPED)} (default); directory or file ({kinds}); hf:owner/name")
    add("--vae", metavar="MODEL", help="take the autoencoder of this model or file (default: the model's own)")
    add("--set", action="append", metavar="KEY=VALUE", help="what a foreign model does not say: parameterization=v")
    add("--lora", action="append", metavar="FILE[:SCALE]", help="merged into the model; four ships (icons, 4 steps)")
    add("--embedding", action="append", metavar="FILE", help="a textual inversion, whose word prompts may then use")
    add_machine(add, None, None)
    add("--attention", choices=("sdpa", "xformers"), help="[sdpa], torch's own; xformers: the extra, CUDA alone")
    add("--backend", choices=BACKENDS, help="[auto], the fastest at once; compile, openvino: after seconds or minutes")
    add("--low-memory", action="store_const", const=True, help="one picture and one network at a time")
    add("--batch-size", type=int, metavar="N", help="pictures drawn at once [4]")
    add("--out", metavar="FOLDER", help="numbered on from what is there [outputs]")
    return parser


def add_many(parser: Parser) -> None:
    """Options of commands that draw many pictures of many prompts."""
    add = parser.add_argument_group("how many").add_argument
    add("--from-file", metavar="FILE", help="a prompt on each line; .json, .jsonl, .csv: prompt, label, negative, seed")
    add("--n", type=int, metavar="N", help="pictures of each prompt [1]")
    add("--reproduce", metavar="FILE.png", help="draw this picture again, from the settings inside it")
    add("--grid", action="store_const", const=True, help="write all pictures on one sheet too")
    add(
        "--grid-labels",
        action="store_const",
        const=True,
        help="write that sheet with prompts and labels below the pictures",
    )


def add_init(
    parser: Parser, usual: Beginning, names: Sequence[str], mask: bool = False, several: str = BATCH
) -> Callable[..., Any]:
    """--init, and a flag for each of the `names` of a Beginning, whose defaults `usual` has; the way to add more."""
    add = parser.add_argument_group("from which picture").add_argument
    more = "its transparent parts are the mask, where none is given; " if mask else ""
    add(
        "--init",
        nargs="+",
        metavar="FILE",
        help=f"PNG, JPEG or WebP; {more}{several}",
    )
    if mask:
        add(
            "--mask",
            metavar="FILE",
            help="of the picture's size: white where to draw, black where it stays, or between",
        )
    add_fields(add, Beginning, names, usual)
    return add


def need_init(given: Mapping[str, Any]) -> None:
    """Raises UserError unless there is a picture to begin with."""
    if "init" not in given and "reproduce" not in given:
        raise UserError("say which picture to begin with: --init FILE, several files, or a folder")


def given_of(parser: Parser, words: Sequence[str] | None = None) -> dict[str, Any]:
    """The options that were given, and only they: defaults live in the library."""
    for word in sys.argv[1:] if words is None else words:  # it goes into the picture and onto the terminal
        if not word.isascii() and any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(f"the argument '{word[:100]}' is not UTF-8; check the terminal's encoding")
    arguments = parser.parse_args(words)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return given | taken(arguments, Settings)


def settings_of(given: Mapping[str, Any]) -> Settings:
    """How to draw, checked."""
    if "options" in given:
        pairs = [word.partition("=") for word in given["options"]]
        if not all(name and equals for name, equals, _ in pairs):
            raise UserError(f"--option takes NAME=VALUE, as --option rtol=1e-6, and got '{' '.join(given['options'])}'")
        given = {**given, "options": {name: value for name, _, value in pairs}}
    names = [field.name for field in dataclasses.fields(Settings) if field.name in given]
    chosen: dict[str, Any] = {"prompt_syntax": "weighted"} | {name: given[name] for name in names}
    return Settings(**chosen).check()


def beginning_of(given: Mapping[str, Any], usual: Beginning) -> Beginning:
    """What to begin from, checked: what was given, before the command's own defaults."""
    names = [field.name for field in dataclasses.fields(Beginning) if field.name in given]
    return dataclasses.replace(usual, **{name: given[name] for name in names}).check()


def requests_of(given: Mapping[str, Any], needed: bool = True) -> list[Request]:
    """What to draw, in order. `needed`: raise UserError where it is not said; otherwise it is then left open."""
    labels, how = given.get("label"), (given.get("negative", ""), given.get("seed", 0), given.get("n", 1))
    if "from_file" in given and "prompt" not in given:
        if labels and len(labels) > 1:
            raise UserError("with --from-file one --label stands in where a row has none; give the others in the file")
        return jobs.read_prompts(given["from_file"], *how, labels and labels[0])
    if "from_file" in given or (needed and not (labels or "prompt" in given)):
        raise UserError("say what to draw with one of these: --prompt TEXT, --label NAME or both; or --from-file FILE")
    return jobs.of_prompts(given.get("prompt", ""), *how, labels)


def adapters_of(given: Mapping[str, Any]) -> tuple[Adapter, ...]:
    """The LoRAs and the words of textual inversions, in order; their files are there."""
    return (*map(parse_lora, given.get("lora", ())), *map(parse_embedding, given.get("embedding", ())))


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
