"""A path -> the Checkpoint that lies there, whatever its format: LAYOUTS, tried in order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoints import diffusers, lora_names, native, original_file, sd3, sd3_directory
from ldm.checkpoints.limits import check_size
from ldm.checkpoints.reading import Tensors, read_tensors
from ldm.checkpoints.record import Checkpoint
from ldm.checkpoints.state import some
from ldm.checkpoints.textual_inversion import CONTAINERS
from ldm.errors import UserError
from ldm.find import WEIGHTS, find


@dataclass(frozen=True)
class Layout:
    """A way in which models are kept. What lies at a path is told by the path and, if it is a file, its tensors."""

    recognises: Callable[[Path, Tensors | None], bool]
    open: Callable[[Path, Any, str, Collection[str]], Checkpoint]  # the last two as in `open_checkpoint`
    two_sets: bool = False  # there may be raw and averaged weights, of which the user chooses


LAYOUTS = (
    Layout(native.is_native, lambda path, tensors, *_: native.open_native(path, tensors)),
    Layout(sd3.is_single_file, sd3.open_single_file),
    Layout(sd3_directory.is_directory, lambda path, _, *how: sd3_directory.open_directory(path, *how)),
    Layout(original_file.is_original, original_file.open_original, two_sets=True),
    Layout(diffusers.is_pipeline, lambda path, _, *how: diffusers.open_directory(path, *how), two_sets=True),
    Layout(diffusers.is_autoencoder, lambda path, tensors, *_: diffusers.open_autoencoder(path, tensors)),
)

STRANGERS = {  # a tensor's name -> whose it is: said by name, since these are what people have lying about
    "double_blocks.": "a Flux checkpoint",
    "control_model.": "a ControlNet",
    "modules.": "what a training goes on from (tools/export_state.py makes a model of its folder)",
    "down_blocks.0.resnets.": "a U-Net of diffusers without its folder and the rest of its model",
}


def open_checkpoint(
    model: str | Path,
    weights: str = "auto",
    settings: Mapping[str, Any] | None = None,
    vae: str | Path | None = None,
) -> Checkpoint:
    """What `model` names (`find`): a native directory or file, an original single file, a diffusers directory, an
    autoencoder.

    No tensor is read yet. `weights`: where a file has raw and averaged U-Net weights, which are meant ("ema", "raw");
    "auto" takes the average and says so. `settings` replace what the files or the rules say, as
    {"parameterization": "v", "text.padding": "eot"}. The autoencoder of `vae` takes the place of the model's own.
    Raises UserError for what is nothing of that, damaged, or contradicts itself in what `settings` do not say.
    """
    path = find(model)
    if weights not in WEIGHTS:
        raise UserError(f"the weights asked for are '{weights}'; choose one of {', '.join(WEIGHTS)}")
    tensors = None if path.is_dir() else read_tensors(path)
    layout = next((each for each in LAYOUTS if each.recognises(path, tensors)), None)
    if layout is None:
        raise _unknown(path, tensors)
    found = layout.open(path, tensors, weights, tuple(settings or ()))
    if weights != "auto" and not layout.two_sets:
        raise UserError(f"{path} has one set of weights; leave out the choice of {weights}")
    if vae is not None:
        found = found.with_autoencoder(open_checkpoint(vae))
    if settings:
        found = found.with_settings(settings)
    check_size(found.config, str(path))
    return found


def open_towers(text: str | Path, text_2: str | Path = "", t5: bool = False) -> Checkpoint:
    """The text towers of the model `text` alone, with its `t5` if it has one, and beside its one the first of the model
    `text_2`; as above."""
    found = open_checkpoint(text)
    found = found.only(*((found.config.readers if t5 else found.config.towers) or ("text",)))
    return found.with_second_tower(open_checkpoint(text_2), both=t5) if text_2 else found


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """["parameterization=v", "text.quick_gelu=true"] -> {"parameterization": "v", "text.quick_gelu": True}.

    Values are YAML's scalars and lists of them. Raises UserError for a word of another form.
    """
    import yaml

    found: dict[str, Any] = {}
    for word in words:
        key, given, value = word.partition("=")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            given = ""
        if not given or not key.strip():
            raise UserError(
                f"--set and init_set take words of the form key=value, as parameterization=v, not '{word[:100]}'"
            )
    return found


def _unknown(path: Path, tensors: Tensors | None) -> UserError:
    if tensors is None:
        return UserError(
            f"{path} has no model.json, model_index.json or config.json, so it is not a checkpoint; name the directory "
            "a training wrote, or that diffusers' save_pretrained wrote"
        )
    if any(lora_names.split(name) for name in tensors):
        return UserError(f"{path} is a LoRA, which goes over a model; say --lora {path} beside the model")
    if any(name in CONTAINERS or name.startswith("string_to_param") for name in tensors):
        return UserError(f"{path} is an embedding, which goes over a model; say --embedding {path} beside the model")
    for start, whose in STRANGERS.items():
        if any(name.startswith(start) for name in tensors):
            return UserError(f"{path} is {whose}, which is not read as a model here")
    names = some([name[:60] for name in tensors], 3) or "none"
    return UserError(
        f"{path} is no checkpoint of a kind that is read here; it holds {len(tensors)} tensors, named {names}"
    )
