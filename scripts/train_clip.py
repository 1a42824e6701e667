"""Between the stages, the CLIP whose text tower conditions stage two.

python scripts/train_clip.py --config configs/clip/icons.yaml data.shards='...' output=runs/clip
"""

from __future__ import annotations

from ldm.script import run

from functools import partial

from ldm.training.command import asked


def main() -> None:
    from ldm.config import ClipTraining

    found = asked(ClipTraining, __doc__)  # before torch is imported
    from ldm.training.clip import ClipStage
    from ldm.training.loop import carry_out

    carry_out(found.settings, partial(ClipStage, said=found.said))


if __name__ == "__main__":
    run(main)
