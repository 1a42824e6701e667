"""Stage one, the autoencoder.

python scripts/train_autoencoder.py --config configs/autoencoder/icons.yaml data.shards='...' output=runs/ae
"""

from __future__ import annotations

from ldm.script import run

from ldm.training.command import asked


def main() -> None:
    from ldm.config import AutoencoderTraining

    found = asked(AutoencoderTraining, __doc__)  # before torch is imported
    from ldm.training.loop import carry_out
    from ldm.training.stage_one import AutoencoderStage

    carry_out(found.settings, AutoencoderStage)


if __name__ == "__main__":
    run(main)
