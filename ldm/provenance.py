"""What a PNG says about how it was made, and how to make it again."""

from __future__ import annotations

import platform
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.image_io import read_metadata
from ldm.jobs import Beginning, Request, Settings
from ldm.jobs.adapters import Adapter, from_record
from ldm.jobs.adapters import differences as adapter_differences
from ldm.jobs.catalogue import own_grid
from ldm.jobs.request import as_label
from ldm.jobs.values import real
from ldm.settings import from_dict

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import Model

MAX_BATCH = 1024  # of a picture to be made again: its number comes from a file, maybe a stranger's
AT_ONCE = 1 << 24  # pixels of such a batch that are drawn: 64 pictures of 512 x 512


@dataclass(frozen=True)
class Recipe:
    """How one picture was made. Its last bits depend on the batch's size, so that is kept along."""

    request: Request
    settings: Settings
    model: str  # name or path, as it was given
    hash: str  # Model.hash
    batch_size: int
    index: int  # its place in the batch
    made_on: Mapping[str, Any]  # what `surroundings` said
    guides: Mapping[str, str] = field(default_factory=dict)  # Helpers.hashes
    adapters: tuple[Adapter, ...] = ()
    vae: str | None = None  # the model whose autoencoder stood in, and
    model_settings: Mapping[str, Any] = field(default_factory=dict)  # load's `settings`, before the files' own words
    begin: Beginning = Beginning()
    inputs: Mapping[str, Any] = field(default_factory=dict)  # what is known of "init", "mask" and "depth"

    @property
    def batch(self) -> list[Request]:
        """A batch of the size it was drawn in, or as many of it as AT_ONCE has room for. What its other pictures show
        does not touch this one."""
        height, width = self.settings.height or 512, self.settings.width or 512
        most = int(AT_ONCE / (height * width * max(self.begin.enlarge, 1.0) ** 2))
        return [self.request] * min(self.batch_size, max(most, 1))

    @property
    def place(self) -> int:
        """Where it is in `batch`."""
        return min(self.index, len(self.batch) - 1)


def record(
    model: Model,
    settings: Settings,
    batch: Sequence[Request],
    index: int,
    guides: Mapping[str, str] | None = None,
    begin: Beginning = Beginning(),
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The plain data that goes into the PNG of picture `index` of `batch`; `read` is the inverse.

    `guides`: the hashes of what steered it beside the model, by the names of their settings. `inputs`: what is to be
    known of the picture that it began with ("init") and of the mask, by these names.
    """
    request = batch[index]
    return {
        "prompt": request.prompt,
        "negative": request.negative,
        "seed": request.seed,
        **({} if request.label is None else {"label": request.label}),
        **{name: list(part) for name, part in _between(request).items()},
        **({"begin": begin.changed()} if begin != Beginning() else {}),
        **(inputs or {}),  # shares, of what lies between two pictures, are for each picture
        **_drawn(model, settings),
        **_model(model),
        "guides": dict(guides or {}),
        "batch": {"size": len(batch), "index": index},
        "made_on": surroundings(model),
    }


def with_size(record: Mapping[str, Any], image: Tensor) -> dict[str, Any]:
    """A record with the picture's own "size", width and height, where that is not what its settings say: it was
    extended or enlarged. `image`: (3, H, W)."""
    size = [image.shape[2], image.shape[1]]
    return dict(record) | ({} if size == [record["width"], record["height"]] else {"size": size})


def record_sheet(model: Model, settings: Settings, requests: Sequence[Request]) -> dict[str, Any]:
    """The plain data that goes into the PNG of a grid."""
    return {
        "prompts": [request.prompt for request in requests],
        "seeds": [request.seed for request in requests],
        **({"labels": [r.label for r in requests]} if any(r.label is not None for r in requests) else {}),
        **_drawn(model, settings),
        **_model(model),
    }


def surroundings(model: Model) -> dict[str, Any]:
    """What else the last bits of a picture depend on."""
    import torch

    import ldm
    from ldm.device import precision_name

    device = model.device
    return {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "precision": precision_name(model.precision),
        "attention": model.unet.attention_backend,
        "backend": model.backend,
        "low_memory": model.works_on is not None,
        "torch": str(torch.__version__),
        "ldm": ldm.__version__,
    }


def read(path: str | Path | bytes) -> Recipe:
    """The recipe in a PNG of ours, a file or its bytes. Raises UserError for any other, and for values that make no
    sense."""
    data = read_metadata(path)
    path = "the picture" if isinstance(path, bytes) else path
    names = [field.name for field in fields(Settings)]
    given = {key: data[key] for key in names if key in data}
    if given.get("sigmas"):
        given.pop("spacing", None)  # of earlier versions, which wrote down one that had no effect
    settings = from_dict(Settings, given, str(path)).check()
    try:
        label = None if data.get("label") is None else as_label(data["label"])
        words = _as(str, data["prompt"]), _as(str, data["negative"])
        toward, variation = _pair(data.get("toward"), str), _pair(data.get("variation"), int)
        request = Request(*words, _as(int, data["seed"]), label, toward, variation).check()
        begin = from_dict(Beginning, _as(dict, data.get("begin", {})), str(path)).check()
        inputs = {name: _as(dict, data[name]) for name in ("init", "other", "mask", "depth") if name in data}
        model, batch, made_on = (_as(dict, data[key]) for key in ("model", "batch", "made_on"))
        for name in {"device", "precision", "attention", "backend"} & set(made_on):
            _as(str, made_on[name])
        size, index = _as(int, batch["size"]), _as(int, batch["index"])
        name, digest, guides = _as(str, model["name"]), _as(str, model["hash"]), _as(dict, data.get("guides", {}))
        adapters = from_record(data.get("adapters", []))
        vae = None if model.get("vae") is None else _as(str, model["vae"])
        given = _as(dict, model.get("set", {}))
        recipe = Recipe(
            request, settings, name, digest, size, index, made_on, guides, adapters, vae, given, begin, inputs
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} lacks a setting that is needed to make it again ({error}); is it a grid?") from error
    if not 0 <= index < size <= MAX_BATCH:
        raise UserError(f"{path} names picture {index} of a batch of {size}: that cannot be")
    return recipe


def _between(request: Request) -> dict[str, tuple[Any, float]]:
    """What it lies between, where it does."""
    return {
        name: part for name, part in (("toward", request.toward), ("variation", request.variation)) if part is not None
    }


def _pair(plain: Any, kind: type) -> Any:
    """The inverse for one of these; raises TypeError or ValueError."""
    if plain is None:
        return None
    other, share = plain
    return _as(kind, other), float(real(share, "the share"))


def refuse_to_fetch(recipe: Recipe, given: Container[str]) -> None:
    """Raise UserError if the picture would have a model fetched that is not among the options `given` by the user.

    A picture may be a stranger's: what is fetched from the network is what its user names, and nothing else.
    """
    settings = recipe.settings
    named = {"model": recipe.model, "vae": recipe.vae, "guide_model": settings.guide_model, "refiner": settings.refiner}
    for option, model in named.items():
        if option not in given and (model or "").startswith("hf:"):
            raise UserError(f"the picture was made with {model}; say --{option.replace('_', '-')} {model} to fetch it")


def differences(recipe: Recipe, model: Model, guides: Mapping[str, str] | None = None) -> list[str]:
    """A sentence for each thing that is not as it was when the picture was made; none: it will be the same bits."""
    found = []
    if recipe.hash != model.hash:
        found.append(
            f"the model differs: the picture was made with {recipe.hash[:10]}, this is {model.hash[:10]} ({model.name})"
        )
    found += adapter_differences(recipe.adapters, model.adapters)
    for name, digest in (guides or {}).items():
        if recipe.guides.get(name) != digest:
            found.append(f"the {name.replace('_', ' ')} is not the one that the picture was made with")
    now = surroundings(model)
    # What there was before a picture said it.
    then = {"attention": "sdpa", "backend": "torch", "low_memory": False} | dict(recipe.made_on)
    changed = [f"{key} was {then.get(key)}, is {now[key]}" for key in now if then.get(key) != now[key]]
    if changed:
        found.append(f"the picture may differ in its last bits: {'; '.join(changed)}")
    if len(recipe.batch) < recipe.batch_size:
        found.append(
            f"the picture may differ in its last bits: it was drawn in a batch of {recipe.batch_size}, and is drawn in "
            f"one of {len(recipe.batch)} now, to save memory"
        )
    return found


def _drawn(model: Model, settings: Settings) -> dict[str, Any]:
    """Checked `settings` with what they leave to the model filled in: how it is meant to be drawn, size and grid."""
    side, checked = model.config.image_size, settings.of(model.config.drawing).check()
    assert checked.sampler is not None
    spacing = checked.spacing or own_grid(checked.sampler, model.law.schedule.is_flow)
    return asdict(checked) | {"width": checked.width or side, "height": checked.height or side, "spacing": spacing}


def _model(model: Model) -> dict[str, Any]:
    """Which model drew, and all that changed it."""
    return {
        "model": {"name": model.name, "hash": model.hash, "vae": model.vae, "set": dict(model.settings)},
        "adapters": [asdict(adapter) for adapter in model.adapters],
    }


def _as(kind: type, value: Any) -> Any:
    """`value`, which must be a `kind`; raises TypeError."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
