"""Textual inversion: teach a model a new word from a few pictures of what it means.

python scripts/train_embedding.py init=icons word='<mine>' begin_with=cat data.shards='...' output=runs/mine
"""

from __future__ import annotations

from ldm.script import run

from functools import partial

from ldm.training.command import asked


def main() -> None:
    from ldm.config import EmbeddingTraining
    from ldm.find import find

    found = asked(EmbeddingTraining, __doc__)  # before torch is imported
    if found.settings.init:
        find(found.settings.init)
    from ldm.training.embedding import embedding_stage
    from ldm.training.loop import carry_out

    carry_out(found.settings, partial(embedding_stage, said=found.said))


if __name__ == "__main__":
    run(main)
