"""Small networks on disk: one pair of files for all of them, as they were always written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.conditioning.image_tower import ImageTower, load_image_tower, save_image_tower
from ldm.config import ImageTowerConfig
from ldm.errors import UserError
from ldm.guidance.noisy_classifier import (
    NoisyClassifier,
    NoisyClassifierConfig,
    load_noisy_classifier,
    save_noisy_classifier,
)
from ldm.judge.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier

TOWER = {"size": 16, "patch": 8, "width": 16, "layers": 1, "heads": 2}
JUDGE = {"classes": ["cat", "dog"], "styles": ["flat"], "size": 32, "channels": 4}
NOISY = {"classes": ["cat", "dog"], "latent_channels": 4, "probe": [0.5], "channels": 8, "multipliers": [1, 2],
         "blocks": 1, "dropout": 0.1, "sigma_min": 0.02, "sigma_max": 20.0}  # fmt: skip
KINDS = {
    "image_tower": (
        lambda: ImageTower(ImageTowerConfig(**TOWER), 8),
        {**TOWER, "embed_dim": 8, "logit_scale": 14.0},
        lambda network, folder: save_image_tower(folder, network, 14.0),
        load_image_tower,
    ),
    "classifier": (
        lambda: Classifier(ClassifierConfig(("cat", "dog"), ("flat",), 32, 4)),
        JUDGE,
        save_classifier,
        load_classifier,
    ),
    "noisy_classifier": (
        lambda: NoisyClassifier(NoisyClassifierConfig(("cat", "dog"), 4, (0.5,), 8, (1, 2))),
        NOISY,
        save_noisy_classifier,
        load_noisy_classifier,
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_files_are_read_and_written_as_ever(name: str, tmp_path: Path) -> None:
    make, document, save, load = KINDS[name]
    network = make()
    save_file(
        {key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / f"{name}.safetensors"
    )
    (tmp_path / f"{name}.json").write_text(json.dumps(document))
    read = load(tmp_path)
    assert read.config == network.config and not read.training and not any(p.requires_grad for p in read.parameters())
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in read.state_dict().items())
    save(read, tmp_path / "again")
    assert json.loads((tmp_path / "again" / f"{name}.json").read_text()) == document


@pytest.mark.parametrize("name", KINDS)
def test_what_does_not_fit_is_told(name: str, tmp_path: Path) -> None:
    make, document, save, load = KINDS[name]
    save(make(), tmp_path)
    path, weights = tmp_path / f"{name}.json", tmp_path / f"{name}.safetensors"
    whole = weights.read_bytes()
    width = "width" if name == "image_tower" else "channels"
    wrong = [
        (document | {width: number}, rf"the {name.replace('_', ' ')} in .* cannot be read") for number in (12, 8000)
    ]
    for changed, words in [*wrong, (document | {"colour": 3}, "unknown setting 'colour'")]:
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            load(tmp_path)
    path.write_text(json.dumps(document))
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=rf"holds no {name}\.json; make one with (tools|scripts)/train_"):
        load(tmp_path)
