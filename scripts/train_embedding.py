"""Textual inversion: teach a model a new word from a few pictures of what it means.

python scripts/train_embedding.py init=icons word='<mine>' begin_with=cat data.shards='...' output=runs/mine
"""

from __future__ import annotations

from ldm.script import run

from ldm.training.command import asked


def main() -> None:
    from ldm.config import EmbeddingTraining
    from ldm.find import find

    found = asked(EmbeddingTraining, __doc__)  # before torch is imported
    settings = found.settings
    if settings.init:
        find(settings.init)
    from ldm.training.embedding import EmbeddingStage
    from ldm.training.loop import prepare_output, train
    from ldm.training.processes import make_accelerator

    output = prepare_output(settings.output, settings.resume)
    accelerator = make_accelerator(settings.loop, output)
    stage = EmbeddingStage(settings, accelerator.process_index, accelerator.num_processes, accelerator.device)
    train(stage, settings.loop, accelerator, output, settings)


if __name__ == "__main__":
    run(main)
