"""Stage two, the diffusion model on the latents of stage one.

python scripts/train_diffusion.py --config configs/diffusion/icons.yaml autoencoder=runs/ae \\
    data.shards='...' output=runs/ldm
python scripts/train_diffusion.py init=icons lora.rank=8 data.shards='...' output=runs/lora
"""

from __future__ import annotations

from ldm.script import run

from ldm.training.command import asked


def main() -> None:
    from ldm.config import DiffusionTraining
    from ldm.find import find

    found = asked(DiffusionTraining, __doc__)
    settings = found.settings
    for name in filter(None, (settings.init,) if settings.init else (settings.autoencoder, settings.text)):
        find(name)  # before torch is imported, which takes seconds
    from ldm.training.loop import prepare_output, train
    from ldm.training.processes import make_accelerator
    from ldm.training.stage_two import DiffusionStage

    output = prepare_output(settings.output, settings.resume)
    accelerator = make_accelerator(settings.loop, output)
    rank, world = accelerator.process_index, accelerator.num_processes
    stage = DiffusionStage(settings, rank, world, accelerator.device, found.said)
    train(stage, settings.loop, accelerator, output, settings)


if __name__ == "__main__":
    run(main)
