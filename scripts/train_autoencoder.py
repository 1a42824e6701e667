"""Stage one, the autoencoder.

python scripts/train_autoencoder.py --config configs/autoencoder/icons.yaml data.shards='...' output=runs/ae
"""

from __future__ import annotations

from ldm.script import run

from functools import partial

from ldm.training.command import asked


def main() -> None:
    from ldm.config import AutoencoderTraining
    from ldm.find import find

    found = asked(AutoencoderTraining, __doc__)  # before torch is imported
    if found.settings.init:
        find(found.settings.init)
    from ldm.training.loop import carry_out
    from ldm.training.stage_one import AutoencoderStage

    carry_out(found.settings, partial(AutoencoderStage, said=found.said))


if __name__ == "__main__":
    run(main)
