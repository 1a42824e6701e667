"""The classifier that judges, its augmentation, and what it looks like on disk."""

import pytest
import torch

from ldm.errors import UserError
from ldm.judge.augment import Augmentation, augment, colour_matrices
from ldm.judge.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier

STILL = Augmentation(rotation=0, scale=0, shift=0, brightness=0, contrast=0, hue=0, blur=0)


def images(count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(("cat", "dog", "house"), ("flat",), size=32, channels=4)).eval()


def test_features_have_unit_length_and_logits_are_scaled_cosines(classifier):
    features, logits = classifier.features(images()), classifier(images())
    assert features.shape == (4, 32)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert logits.shape == (4, 3)
    assert bool((logits.abs() <= classifier.log_scale.exp() + 1e-4).all())


def test_it_learns(classifier):
    """Two colours on the same noise, a dozen steps: the loss falls, so every layer passes its gradient on."""
    x = 0.1 * images(8)
    x[:4, 0] += 0.5
    y = torch.tensor([0] * 4 + [1] * 4)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(classifier.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and bool(p.grad.any()) for p in classifier.parameters())
    assert losses[-1] < 0.2 * losses[0]


def test_it_comes_back_from_disk(classifier, tmp_path):
    save_classifier(classifier, tmp_path / "c")
    again = load_classifier(tmp_path / "c")
    assert again.config == classifier.config
    assert not again.training
    torch.testing.assert_close(again(images()), classifier(images()), rtol=0, atol=0)


def test_a_missing_and_a_torn_classifier_are_named(classifier, tmp_path):
    with pytest.raises(UserError, match=r"holds no classifier\.json; make one with tools/train_classifier\.py"):
        load_classifier(tmp_path / "nothing")
    save_classifier(classifier, tmp_path)
    weights = tmp_path / "classifier.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.json").write_text('{"classes": ["cat"], "layers": 3}')
    with pytest.raises(UserError, match="unknown setting 'layers'"):
        load_classifier(tmp_path)


def test_augmentation_that_moves_nothing_only_mirrors():
    image = images(16)
    out = augment(image, torch.Generator().manual_seed(1), STILL)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(out, image, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(out, image, strict=True)]
    assert [a != b for a, b in zip(same, mirrored, strict=True)] == [True] * 16
    assert 3 <= sum(mirrored) <= 13


def test_augmentation_is_drawn_from_its_generator_and_stays_in_range():
    draw = [augment(images(), torch.Generator().manual_seed(seed), Augmentation()) for seed in (1, 1, 2)]
    torch.testing.assert_close(draw[0], draw[1], rtol=0, atol=0)
    assert not torch.allclose(draw[0], draw[2])
    assert draw[0].shape == (4, 3, 32, 32)
    assert draw[0].min() >= -1 and draw[0].max() <= 1


def test_a_shift_shows_the_border_and_not_black():
    image = torch.ones(8, 3, 32, 32)
    image[:, :, 12:20, 12:20] = -1
    moved = augment(image, torch.Generator().manual_seed(0), Augmentation(0, 0, 0.2, 0, 0, 0, 0))
    torch.testing.assert_close(moved[:, :, 0], torch.ones(8, 3, 32))
    assert not torch.allclose(moved, image)


def test_hue_turns_about_the_gray_axis():
    turns = torch.deg2rad(torch.tensor([0.0, 120.0, 25.0]))
    matrices = colour_matrices(turns, torch.ones(3))
    gray = torch.full((3,), 0.4)
    torch.testing.assert_close(matrices @ gray, gray.repeat(3, 1))
    red, green = torch.eye(3)[0], torch.eye(3)[1]
    torch.testing.assert_close(matrices[0] @ red, red)
    torch.testing.assert_close(matrices[1] @ red, green, atol=1e-6, rtol=0)
    torch.testing.assert_close(matrices[2] @ matrices[2].T, torch.eye(3), atol=1e-6, rtol=0)
