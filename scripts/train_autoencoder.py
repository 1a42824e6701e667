"""Stage one, the autoencoder.

python scripts/train_autoencoder.py --config configs/autoencoder/icons.yaml data.shards='...' output=runs/ae
"""

from __future__ import annotations

from ldm.script import run

from ldm.training.command import asked


def main() -> None:
    from ldm.config import AutoencoderTraining

    found = asked(AutoencoderTraining, __doc__)  # before torch is imported
    settings = found.settings
    from ldm.training.loop import prepare_output, train
    from ldm.training.processes import make_accelerator
    from ldm.training.stage_one import AutoencoderStage

    output = prepare_output(settings.output, settings.resume)
    accelerator = make_accelerator(settings.loop, output)
    stage = AutoencoderStage(settings, accelerator.process_index, accelerator.num_processes, accelerator.device)
    train(stage, settings.loop, accelerator, output, settings)


if __name__ == "__main__":
    run(main)
