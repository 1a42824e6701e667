"""What a training would leave behind had it ended at one of its saved states: a model, a LoRA or a word.

The run's own settings make its stage, the state fills the networks, and the stage exports them. Whatever a run reads
only to train (held-out shards, the perceptual network, cached latents) is left alone. The shards of pictures are read
where the result depends on them: the scale of an autoencoder's latents, the words of a text tower's captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.run_folder import saved_steps
from ldm.config import AutoencoderTraining, ClipTraining, DiffusionTraining, EmbeddingTraining, load
from ldm.errors import UserError, first_line
from ldm.plain import read_json
from ldm.training.clip import ClipStage
from ldm.training.embedding import embedding_stage
from ldm.training.sharding import unpack
from ldm.training.stage import Stage
from ldm.training.stage_one import AutoencoderStage
from ldm.training.stage_two import diffusion_stage
from ldm.training.state import load_state, read_part

UNUSED = ("resume=", "loop.micro_batch=0", "loop.compile=false", "data.validation=", "data.workers=0")
KINDS: Mapping[str, tuple[Any, Any, tuple[str, ...]]] = {  # a setting that a training alone has -> what it is
    "word": (EmbeddingTraining, embedding_stage, ("sample.prompts=[]",)),
    "image_tower": (ClipTraining, ClipStage, ()),
    "scale_samples": (AutoencoderTraining, AutoencoderStage, ("loss.l1=1", "loss.perceptual=0", "loss.adversarial=0")),
    "latents": (DiffusionTraining, diffusion_stage, ("attention=sdpa", "sample.prompts=[]", "figures={}")),
}


def export_state(run: Path, output: Path, step: int = 0, weights: str = "auto", words: Sequence[str] = ()) -> str:
    """Write into the folder `output` what the training in `run` would have left after `step` (0: its newest state).

    weights: "ema" the averaged ones, "raw" those that were trained, "auto" the averaged ones if the run has an average.
    words: settings over the run's own, for what lies elsewhere now ("autoencoder=models/ae").
    Returns a sentence on what was written. Raises UserError for a run, a state or weights that are not there, and for
    an output that is a file or a run's own folder.
    """
    if output.suffix in (".safetensors", ".ckpt", ".pt") or (output.exists() and not output.is_dir()):
        raise UserError(f"{output} would be a file; name a folder (tools/convert_checkpoint.py makes one file of it)")
    if (output / "state").is_dir():
        raise UserError(
            f"{output} is the folder of a training, whose own end would be mixed up with this; name a new one"
        )
    if not (run / "config.json").is_file():
        raise UserError(f"{run} has no config.json, so it is not the folder of a training")
    step, state = _state(run, step)
    stage = _stage(run, (f"loop.steps={step}", *words))
    averaged = bool(state["averages"]) and weights != "raw"
    if weights == "ema" and not averaged:
        raise UserError(f"the training in {run} keeps no average of its weights (loop.ema is 0); say --weights raw")
    try:
        for name, player in stage.players.items():
            average = state["averages"][name]["average"] if averaged else {}
            player.module.load_state_dict({**state["modules"][name], **average})
            player.module.eval()
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"the state of step {step} in {run} is not of the run that its config.json says ({first_line(error)})"
        ) from error
    with torch.no_grad():
        stage.export(output, finished=True)
    return f"wrote {output}: step {step}, the {'averaged' if averaged else 'raw'} weights"


def _state(run: Path, step: int) -> tuple[int, dict[str, Any]]:
    """The step and the networks of a state, the newest for 0; what was spread over processes is put together."""
    steps = saved_steps(run)
    if not steps or (step and step not in steps):
        has = f"there are those of steps {', '.join(map(str, steps))}" if steps else "it has not saved any yet"
        raise UserError(f"{run} has no state" + (f" of step {step}" if step else "") + f"; {has}")
    try:
        found = (step, read_part(run, step, check=True, mapped=True)) if step else load_state(run, mapped=True)
        assert found is not None  # there is a step
        step, state = found
        count = state.get("shares", 0)
        parts = [read_part(run, step, f".{rank}of{count}", check=True) for rank in range(count)]
        return step, unpack({name: state[name] for name in ("modules", "averages")}, parts, None)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"the state of step {step} in {run} cannot be read ({first_line(error)}); choose another --step"
        ) from error


def _stage(run: Path, words: Sequence[str]) -> Stage:
    """The stage of the training in `run`, on the CPU, ready to export and for nothing else."""
    where = run / "config.json"
    plain = read_json(where)
    for name, (settings, stage, unused) in KINDS.items():
        if name in plain:
            return stage(load(settings, where, [*UNUSED, *unused, *words]), 0, 1, torch.device("cpu"))
    raise UserError(f"{where} has the settings of no training that is known here")
