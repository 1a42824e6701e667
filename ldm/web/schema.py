"""The form: a JSON schema of the dataclasses that `job.read` reads, with what there is to choose from."""

from __future__ import annotations

import dataclasses
import math
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from ldm.arguments import comments
from ldm.image_io import finite
from ldm.jobs import Beginning, catalogue
from ldm.jobs.beginning import MAX_FACTOR
from ldm.jobs.settings import THRESHOLDS
from ldm.provenance import Recipe
from ldm.ranges import MAX_SEED, MAX_SIDE, OneOf, Range
from ldm.web.job import PARTS, STRENGTH
from ldm.web.limits import LETTERS, SMALLEST_TILE, Limits
from ldm.web.sent import MOST_FEATHER
from ldm.web.shelf import Shelf

NAMES: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


def schema(shelf: Shelf, limits: Limits) -> dict[str, Any]:
    """JSON schema (2020-12) of what /api/draw takes. Keys that begin with x- are notes for people and forms."""
    properties: dict[str, Any] = {}
    for part in PARTS:
        about, hints = comments(part), get_type_hints(part, include_extras=True)
        for field in dataclasses.fields(part):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            line = about.get(field.name, "").replace("None:", "default:")
            told = {"description": line, "default": default, "x-part": part.__name__.lower()}
            properties[field.name] = told | of(hints[field.name])
    for name, line in {"image": "the picture to begin from", "mask": "of its size: white where to draw"}.items():
        about = f"{line}; PNG, JPEG or WebP, in JSON as base64"
        told = {"description": about, "default": None, "x-file": True, "contentEncoding": "base64"}
        properties[name] = told | {"type": ["string", "null"]}
    for name, more in _here(shelf, limits).items():
        properties[name] |= more
    return finite(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "what /api/draw takes",
            "type": "object",
            "additionalProperties": False,
            "properties": properties,
            "x-side": {name: model.config.image_size for name, model in shelf.opened.items()},
            "x-usual": {name: dataclasses.asdict(model.config.drawing) for name, model in shelf.opened.items()},
            "x-labels": {name: list(model.encoder.rows) for name, model in shelf.opened.items()},
            "x-limits": dataclasses.asdict(limits),
        }
    )


def of(hint: Any) -> dict[str, Any]:
    """A type as a JSON schema."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return of(inner[0]) | _range(hint.__metadata__[0])
    if origin in (Union, types.UnionType):
        made = of(next(each for each in inner if each is not types.NoneType))
        return made | {"type": [made["type"], "null"]}
    if origin is tuple:
        endless = inner[-1] is ...
        length = {} if endless else {"minItems": len(inner), "maxItems": len(inner)}
        return {"type": "array", "items": of(inner[0])} | length
    if origin is dict:
        return {"type": "object", "additionalProperties": {} if inner[1] is Any else of(inner[1])}
    return {"type": NAMES[hint]}


def form(recipe: Recipe, shelf: Shelf) -> dict[str, Any]:
    """The settings of a picture, as `job.read` takes them, and sentences on what of them is not here."""
    usual = {field.name: field.default for part in PARTS for field in dataclasses.fields(part)}
    found = dataclasses.asdict(recipe.settings) | dataclasses.asdict(recipe.request) | recipe.begin.changed()
    named = {"model": recipe.model} | {name: found[name] for name in ("guide_model", "refiner", "classifier")}
    known = dict.fromkeys(named, shelf.models) | {"classifier": shelf.classifiers}
    missing = ["it began with a picture, which is not in it; give that too"] if recipe.inputs else []
    for name, path in named.items():
        here = path if path in known[name] else Path(path or "").name
        found[name] = here if here in known[name] else None
        missing += [f"the {name.replace('_', ' ')} {here} is not here"] if path and found[name] is None else []
    for kind, key, there in (("lora", "loras", shelf.loras), ("embedding", "embeddings", shelf.embeddings)):
        wanted = {Path(a.path).name: a.scale for a in recipe.adapters if a.kind == kind}
        missing += [f"the {kind} {name} is not here" for name in wanted if name not in there]
        here = {name: scale for name, scale in wanted.items() if name in there}
        found[key] = here if kind == "lora" else list(here)
    if recipe.request.toward or recipe.request.variation:
        missing.append("it lies between two prompts or seeds, of which only the first is taken")
    changed = {n: value for n, value in found.items() if n in usual and value not in (usual[n], None, (), [], {})}
    if changed.get("seed", 0) > 2**53:  # what a browser holds of a whole number; a text is read too
        changed["seed"] = str(changed["seed"])
    return finite({"settings": changed, "notices": missing})


def _here(shelf: Shelf, limits: Limits) -> dict[str, dict[str, Any]]:
    """What is known of the fields beside their types."""
    models, classifiers = [*shelf.models], [*shelf.classifiers]
    infos = catalogue.SAMPLERS
    pixels = {"minimum": 0, "maximum": MAX_SIDE}
    side = {"type": "integer", "minimum": 1, "maximum": MAX_SIDE}
    return {
        "prompt": {"maxLength": LETTERS},
        "negative": {"maxLength": LETTERS},
        "n": {"minimum": 1, "maximum": limits.most_pictures},
        "seed": {"minimum": 0, "maximum": MAX_SEED},
        "steps": {"minimum": 1, "maximum": limits.most_steps},
        "width": {"minimum": 1, "maximum": limits.most_side},
        "height": {"minimum": 1, "maximum": limits.most_side},
        "cfg_rescale": {"minimum": 0, "maximum": 1},
        "eta": {"minimum": 0},
        "sigmas": {"items": {"type": "number", "minimum": 0}, "maxItems": limits.most_steps + 1},
        "perp_negative": {"minimum": 0},
        "threshold_bound": {"exclusiveMinimum": 0},
        "rho": {"exclusiveMinimum": 0},
        "merge_tokens": {"exclusiveMinimum": 0, "maximum": 0.75},
        "reuse": {"minimum": 2},
        "reuse_branch": {"minimum": 0},
        "tile": {"minimum": SMALLEST_TILE},
        "original_size": {"items": side},
        "target_size": {"items": side},
        "crop": {"items": side | {"minimum": 0}},
        "enlarge": {"minimum": 1, "maximum": MAX_FACTOR},
        "window": pixels,
        "extend": {"items": side | {"minimum": 0}, "maxItems": 4},
        "feather": {"minimum": 0, "maximum": MOST_FEATHER},
        "only_masked": pixels,
        "sampler": {
            "enum": [*infos, None],
            "x-about": {name: info.line for name, info in infos.items()},
            "x-options": {name: dict(info.options) for name, info in infos.items()},
        },
        "spacing": {"enum": [*catalogue.GRIDS, None], "x-about": catalogue.GRIDS},
        "prompt_syntax": {"enum": ["weighted", "plain"], "default": "weighted"},
        "strength": {
            "type": ["number", "null"],
            "default": None,
            "description": f"{comments(Beginning)['strength']}; default: {STRENGTH} of a picture, 1 of a part of one",
            "minimum": 0,
            "maximum": 1,
        },
        "threshold": {"enum": [*THRESHOLDS, None]},
        "model": {"enum": models, "default": shelf.first},
        "guide_model": {"enum": [*models, None]},
        "refiner": {"enum": [*models, None]},
        "classifier": {"enum": [*classifiers, None]},
        "loras": {"propertyNames": {"enum": [*shelf.loras]}},
        "embeddings": {"items": {"type": "string", "enum": [*shelf.embeddings]}},
    }


def _range(rule: Any) -> dict[str, Any]:
    if isinstance(rule, OneOf):
        return {"enum": list(rule.words)}
    if not isinstance(rule, Range):
        return {}
    said = {
        "minimum": rule.least, "maximum": rule.most, "exclusiveMinimum": rule.above, "exclusiveMaximum": rule.below
    }  # fmt: skip
    return {key: end for key, end in said.items() if math.isfinite(end)}
