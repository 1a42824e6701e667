"""Between the stages, the CLIP whose text tower conditions stage two.

python scripts/train_clip.py --config configs/clip/icons.yaml data.shards='...' output=runs/clip
"""

from __future__ import annotations

from ldm.script import run

from ldm.training.command import asked


def main() -> None:
    from ldm.config import ClipTraining

    found = asked(ClipTraining, __doc__)  # before torch is imported
    settings = found.settings
    from ldm.training.clip import ClipStage
    from ldm.training.loop import prepare_output, train
    from ldm.training.processes import make_accelerator

    output = prepare_output(settings.output, settings.resume)
    accelerator = make_accelerator(settings.loop, output)
    rank, world = accelerator.process_index, accelerator.num_processes
    stage = ClipStage(settings, rank, world, accelerator.device, found.said)
    train(stage, settings.loop, accelerator, output, settings)


if __name__ == "__main__":
    run(main)
