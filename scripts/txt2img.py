"""Draw pictures of prompts.

python scripts/txt2img.py --prompt "a red heart" --cfg 7.5
python scripts/txt2img.py --model runs/classes --label cat --label dog --cfg 3
python scripts/txt2img.py --from-file prompts.jsonl --n 4 --grid --out outputs/sheet
python scripts/txt2img.py --reproduce outputs/00000.png
"""

from __future__ import annotations

from ldm.script import run

import dataclasses
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ldm import image_io, jobs, provenance
from ldm.arguments import Parser, add_fields, add_machine, taken
from ldm.backends import BACKENDS
from ldm.errors import UserError
from ldm.find import SHIPPED, find
from ldm.helpers import check_paths, open_helpers
from ldm.jobs import Request, Settings, catalogue
from ldm.jobs.adapters import Adapter, parse_embedding, parse_lora
from ldm.model import CheckpointNotice

if TYPE_CHECKING:
    from tqdm import tqdm

    from ldm.sampling import Step


def main() -> None:
    given = parse()
    if given.pop("list_samplers", False):
        print(catalogue.listing())
        return
    # What can be wrong without a model is found before torch is imported, which takes seconds.
    recipe = provenance.read(given["reproduce"]) if "reproduce" in given else None
    if recipe is not None:
        named = {"guide_model"} if recipe.settings.guide_model else set()  # where the same one lies here
        taken = sorted(
            set(given)
            - {"reproduce", "model", "vae", "set", "device", "precision", "attention", "backend", "low_memory", "out"}
            - named
        )
        if taken:
            raise UserError(f"--{taken[0].replace('_', '-')} does not go with --reproduce, which reads it in the file")
        provenance.refuse_to_fetch(recipe, given)
        guide = given.get("guide_model", recipe.settings.guide_model)
        settings, batches = dataclasses.replace(recipe.settings, guide_model=guide), [recipe.batch]
    else:
        settings = settings_of(given)
        batches = list(jobs.batches(requests_of(given), given.get("batch_size", 4)))
    name = given.get("model", recipe.model if recipe else "icons")
    find(name)
    vae = given.get("vae", recipe.vae if recipe else None)
    if vae is not None:
        find(vae)
    plan = settings.plan()
    check_paths(plan)
    adapters = recipe.adapters if recipe else adapters_of(given)
    folder = Path(given.get("out", "outputs"))
    image_io.check_folder(folder)

    import torch
    from tqdm import tqdm

    import ldm
    from ldm import generate
    from ldm.checkpoints.opening import parse_settings

    before = recipe.made_on if recipe else {}
    device = given.get("device", before.get("device", "auto"))
    warnings.simplefilter("ignore", CheckpointNotice)  # said below, as all that is worth a warning
    model = ldm.load(
        name,
        device,
        given.get("precision", before.get("precision", "auto")),
        vae=vae,
        attention=given.get("attention", before.get("attention", "sdpa")),
        backend=given.get("backend", before.get("backend", "torch") if recipe else "auto"),
        low_memory=given.get("low_memory", before.get("low_memory") is True),
        settings=parse_settings(given["set"]) if "set" in given else recipe.model_settings if recipe else {},
    )
    if adapters:
        from ldm.adapters import use

        model = use.apply(model, adapters)
    helpers = open_helpers(model, plan)
    notices = [*model.notices, *helpers.notices]
    notices += settings.without_effect([request for batch in batches for request in batch])
    for reader in (model, *helpers.models.values()):
        notices += generate.prompt_notices(reader, [request for batch in batches for request in batch], plan.weighted)
    notices += provenance.differences(recipe, model, helpers.hashes) if recipe else []
    for notice in dict.fromkeys(notices):
        print(f"warning: {notice}", file=sys.stderr)

    sheet: list[tuple[torch.Tensor, Request, Path]] = []
    with tqdm(total=len(batches) * settings.steps, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:
        for batch in batches:
            last = watch(generate.sample(model, batch, plan, helpers), bar)
            images = generate.decode(model, last, settings.tile).cpu()
            for index in range(len(batch)) if recipe is None else [recipe.index]:
                record = provenance.record(model, settings, batch, index, helpers.hashes)
                path = image_io.save_numbered(images[index], folder, record)
                bar.write(f"{path}  seed {batch[index].seed}", file=sys.stdout)
                sys.stdout.flush()
                if {"grid", "grid_labels"} & set(given):
                    sheet.append((images[index], batch[index], path))
    if sheet:
        pictures, requests, paths = zip(*sheet, strict=True)
        record = provenance.record_sheet(model, settings, requests)
        labels = [request.title for request in requests] if "grid_labels" in given else None
        whole = image_io.grid(torch.stack(pictures), labels=labels)
        print(image_io.save_numbered(whole, folder, record, "grid-", first=int(paths[0].stem)))


def watch(steps: Iterator[Step], bar: tqdm[NoReturn]) -> Step:
    """Walk to the end of a trajectory, showing where it is; its last step."""
    for step in steps:
        bar.update()
        if step.index + 1 == step.total:
            return step
    raise AssertionError("a sampler yields as many steps as it says")


def settings_of(given: Mapping[str, Any]) -> Settings:
    """How to draw, checked."""
    if "options" in given:
        pairs = [word.partition("=") for word in given["options"]]
        if not all(name and equals for name, equals, _ in pairs):
            raise UserError(f"--option takes NAME=VALUE, as --option rtol=1e-6, and got '{' '.join(given['options'])}'")
        given = {**given, "options": {name: value for name, _, value in pairs}}
    names = [field.name for field in dataclasses.fields(Settings) if field.name in given]
    return Settings(**{"prompt_syntax": "weighted"} | {name: given[name] for name in names}).check()


def requests_of(given: Mapping[str, Any]) -> list[Request]:
    """What to draw, in order."""
    labels, how = given.get("label"), (given.get("negative", ""), given.get("seed", 0), given.get("n", 1))
    if "from_file" in given and "prompt" not in given:
        if labels and len(labels) > 1:
            raise UserError("with --from-file one --label stands in where a row has none; give the others in the file")
        return jobs.read_prompts(given["from_file"], *how, labels and labels[0])
    if "from_file" in given or not (labels or "prompt" in given):
        raise UserError("say what to draw with one of these: --prompt TEXT, --label NAME or both; or --from-file FILE")
    return jobs.of_prompts(given.get("prompt", ""), *how, labels)


def adapters_of(given: Mapping[str, Any]) -> tuple[Adapter, ...]:
    """The LoRAs and the words of textual inversions, in order; their files are there."""
    return (*map(parse_lora, given.get("lora", ())), *map(parse_embedding, given.get("embedding", ())))


def parse(words: Sequence[str] | None = None) -> dict[str, Any]:
    """The options that were given, and only they: defaults live in the library."""
    about, _, examples = (__doc__ or "").partition("\n\n")
    parser = Parser(description=about, epilog=examples)
    add = parser.add_argument_group("what to draw").add_argument
    add("--prompt", action="append", metavar="TEXT", help="may be given several times")
    add(
        "--label", action="append", metavar="NAME", help="a class, of a model that has them; may be given several times"
    )
    add("--from-file", metavar="FILE", help="a prompt on each line; .json, .jsonl, .csv: prompt, label, negative, seed")
    add("--negative", metavar="TEXT", help="what not to draw (default: nothing in particular)")
    add("--n", type=int, metavar="N", help="pictures of each prompt [1]")
    add("--seed", type=int, metavar="N", help="of the first picture; picture i has seed + i [0]")
    add("--reproduce", metavar="FILE.png", help="draw this picture again, from the settings inside it")

    add = parser.add_argument_group("how to draw").add_argument
    add_fields(add, Settings, [field.name for field in dataclasses.fields(Settings) if field.name != "options"])
    add("--option", dest="options", action="append", metavar="NAME=VALUE", help="of the sampler; --list-samplers")
    add("--list-samplers", action="store_const", const=True, help="print the samplers and grids, a line each, and end")

    add = parser.add_argument_group("with what, and where to").add_argument
    kinds = "ours, diffusers, Stable Diffusion's .safetensors or .ckpt"
    add("--model", metavar="MODEL", help=f"{', '.join(SHIPPED)} (default); directory or file ({kinds}); hf:owner/name")
    add("--vae", metavar="MODEL", help="take the autoencoder of this model or file (default: the model's own)")
    add("--set", action="append", metavar="KEY=VALUE", help="what a foreign model does not say: parameterization=v")
    add("--lora", action="append", metavar="FILE[:SCALE]", help="merged into the model; may be given several times")
    add("--embedding", action="append", metavar="FILE", help="a textual inversion, whose word prompts may then use")
    add_machine(add, None, None)
    add("--attention", choices=("sdpa", "xformers"), help="[sdpa], torch's own; xformers: the extra, CUDA alone")
    add("--backend", choices=BACKENDS, help="[auto], the fastest from the first picture on; compile: torch.compile")
    add(
        "--low-memory",
        action="store_const",
        const=True,
        help="one picture and one network at a time",
    )
    add("--batch-size", type=int, metavar="N", help="pictures drawn at once [4]")
    add("--out", metavar="FOLDER", help="numbered on from what is there [outputs]")
    add("--grid", action="store_const", const=True, help="write all pictures on one sheet too")
    add(
        "--grid-labels",
        action="store_const",
        const=True,
        help="write that sheet with prompts and labels below the pictures",
    )
    for word in sys.argv[1:] if words is None else words:  # it goes into the picture and onto the terminal
        if not word.isascii() and any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(f"the argument '{word[:100]}' is not UTF-8; check the terminal's encoding")
    arguments = parser.parse_args(words)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return given | taken(arguments, Settings)


if __name__ == "__main__":
    run(main)
