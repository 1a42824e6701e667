"""Stage two, the diffusion model on the latents of stage one.

python scripts/train_diffusion.py --config configs/diffusion/icons.yaml autoencoder=runs/ae \\
    data.shards='...' output=runs/ldm
python scripts/train_diffusion.py init=icons lora.rank=8 data.shards='...' output=runs/lora
"""

from __future__ import annotations

from ldm.script import run

from functools import partial

from ldm.training.command import asked


def main() -> None:
    from ldm.config import DiffusionTraining
    from ldm.find import find

    found = asked(DiffusionTraining, __doc__)  # before torch is imported
    names = (found.settings.init,) if found.settings.init else (found.settings.autoencoder, found.settings.text)
    for name in filter(None, names):
        find(name)
    from ldm.training.loop import carry_out
    from ldm.training.stage_two import diffusion_stage

    carry_out(found.settings, partial(diffusion_stage, said=found.said))


if __name__ == "__main__":
    run(main)
