"""Feature spaces: which weights they take, how pictures reach their size, what they are called."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch

from ldm.autoencoder.perceptual import efficientnet_lite0
from ldm.checkpoints import native
from ldm.conditioning.clip import TextTower
from ldm.conditioning.image_tower import ImageTower, save_image_tower
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.config import ImageTowerConfig, ModelConfig, TextConfig
from ldm.errors import UserError
from ldm.metrics import inception
from ldm.metrics.features import resized
from ldm.metrics.spaces import make_space

declare_missing_operators()


def images(count=3, side=20, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_resizing_is_that_of_clean_fid():
    resize = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    for side in (64, 400):  # up and down
        levels = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        wanted = resize(levels.permute(1, 2, 0).numpy())
        ours = (resized(levels.float().div(127.5).sub(1).unsqueeze(0), 299)[0] + 1) * 127.5
        np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), wanted, atol=5e-3)  # of 255


def test_the_default_space_needs_no_network():
    space = make_space("efficientnet-lite0")
    found = space(images(2))
    assert found.shape == (2, space.width) and len(space.hash) == 64 and "perceptual loss" in space.note
    network = efficientnet_lite0().eval()
    x = (resized(images(2), 224) + 1) / 2
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        wanted = network.extract_features(x).mean((2, 3))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert space.protocol()["resize"] == "224 px, bicubic, antialiased, float"


@pytest.fixture(scope="module")
def weights():
    """A file of a random network of the Inception architecture."""
    from torch_fidelity import feature_extractor_inceptionv3 as peer

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "load_state_dict_from_url", lambda url, progress: None)
        patch.setattr(peer.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = peer.FeatureExtractorInceptionV3("random", ["2048"], None, verbose=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # as they are, all features would be 1e-8
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    return network, content.getvalue()


def test_inception_takes_only_the_network_that_fid_is_defined_with(tmp_path, weights):
    path = tmp_path / "weights.pth"
    path.write_bytes(weights[1])
    with pytest.raises(UserError, match="is not the network that FID is defined with: its sha256 begins with"):
        make_space(f"inception={path}")
    with pytest.raises(UserError, match="in no package"):
        make_space("inception")
    with pytest.raises(UserError, match="no such file"):
        make_space(f"inception={tmp_path / 'none'}")


def test_inception_of_a_file_of_the_right_hash(tmp_path, weights, monkeypatch):
    network, content = weights
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(content).hexdigest()[:8])
    space, legacy = make_space(f"inception={path}"), make_space(f"inception-legacy={path}")
    image = images(1, side=299)
    found = space(image)
    assert found.shape == (1, 2048 + 1008) and space.hash == hashlib.sha256(content).hexdigest()
    levels = image.add(1).mul(127.5).round().to(torch.uint8)
    with torch.no_grad():
        wanted = network(levels)[0]
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(found[:, :2048], wanted)
    torch.testing.assert_close(legacy(image), found)  # at the network's own size there is nothing to resize
    torch.testing.assert_close(found[:, 2048:], wanted @ network.fc.weight.T)
    assert not torch.allclose(space(images(1, 40)), legacy(images(1, 40)), rtol=0.01)


def test_inception_weights_are_read_as_data(tmp_path, monkeypatch):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    content = pickle.dumps(Bomb(), protocol=2)
    (tmp_path / "bomb.pth").write_bytes(content)
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(content).hexdigest()[:8])
    with pytest.raises(UserError, match="cannot be read"):
        make_space(f"inception={tmp_path / 'bomb.pth'}")
    assert not (tmp_path / "exploded").exists()


def test_a_download_is_checked_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"an error page"))
    with pytest.raises(UserError, match="not the network that FID is defined with"):
        make_space("inception=download")
    assert not list((tmp_path / "checkpoints").iterdir())  # nothing wrong is kept

    def offline(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(inception.urllib.request, "urlopen", offline)
    with pytest.raises(UserError, match=r"cannot be fetched .* give them as inception=FILE"):
        make_space("inception=download")


def test_our_own_two_towers(tmp_path):
    config = TextConfig(context_length=16, token_ids=(0, *range(300, 800), 49406, 49407), width=32, heads=2, layers=1,
                        embed_dim=16)  # fmt: skip
    torch.manual_seed(0)
    text, tower = TextTower(config), ImageTower(ImageTowerConfig(size=16, patch=8, width=32, layers=1, heads=2), 16)
    native.save(tmp_path, ModelConfig(text=config), {"text": text})
    with pytest.raises(UserError, match=r"image_tower\.json"):
        make_space(f"clip={tmp_path}")
    save_image_tower(tmp_path, tower, 10.0)
    space = make_space(f"clip={tmp_path}")
    assert space.name == f"clip-{space.hash[:8]}" and space.text is not None
    with torch.no_grad():
        torch.testing.assert_close(space(images(2, side=16)), tower.eval()(images(2, side=16)))
        tokens, _ = text.tokenize(["a cat", "a dog"])
        torch.testing.assert_close(space.text(["a cat", "a dog"]), text.eval().features(tokens))
    assert space(images(2, side=40)).shape == (2, 16)
    with pytest.raises(UserError, match="clip=runs/clip"):
        make_space("clip")


def test_an_open_clip_architecture_with_a_file(tmp_path, monkeypatch):
    import open_clip

    (tmp_path / "Small-8.json").write_text(
        json.dumps(
            {
                "embed_dim": 16,
                "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
                "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
            }
        )
    )
    open_clip.add_model_config(tmp_path / "Small-8.json")
    model = open_clip.create_model("Small-8", load_weights=False).eval()
    torch.save(model.state_dict(), tmp_path / "small.pt")
    with pytest.raises(UserError, match="no published weights of Small-8, so it is unknown how it prepares pictures"):
        make_space(f"Small-8={tmp_path / 'small.pt'}")
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 0.5), "interpolation": "bilinear"}
    published = {"half": half, "quick": {"quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Small-8", published)
    space = make_space(f"Small-8={tmp_path / 'small.pt'}")
    assert space.name == f"Small-8-{space.hash[:8]}" and space.width == 16 and space.text is not None
    with torch.no_grad():
        wanted = model.encode_text(open_clip.get_tokenizer("Small-8")(["a cat"]))
    torch.testing.assert_close(space.text(["a cat"]), wanted)
    assert space(images(2, side=40)).shape == (2, 16)
    image = images(2, side=16)  # (x + 1) / 2 less a half, over a quarter and halves
    with torch.no_grad():
        torch.testing.assert_close(space(image), model.encode_image(image * torch.tensor([2.0, 1, 1]).view(3, 1, 1)))
    assert space.resize == "16 px, bilinear, antialiased, float; mean 0.5/0.5/0.5, deviation 0.25/0.5/0.5"

    with pytest.raises(UserError, match="'quick' have another activation; take the architecture Small-8-quickgelu"):
        make_space(f"Small-8:quick={tmp_path / 'small.pt'}")
    with pytest.raises(UserError, match="no weights 'none' of Small-8; choose from half, quick"):
        make_space(f"Small-8:none={tmp_path / 'small.pt'}")
    monkeypatch.setitem(published, "openai", {})
    with pytest.raises(UserError, match="take pictures in 2 ways; say which the file has, as Small-8:half=FILE"):
        make_space(f"Small-8={tmp_path / 'small.pt'}")
    assert make_space(f"Small-8:openai={tmp_path / 'small.pt'}").resize.startswith("16 px, bicubic")
    torch.save({"nothing": torch.zeros(1)}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="holds no weights of Small-8"):
        make_space(f"Small-8:half={tmp_path / 'bad.pt'}")


def test_unknown_spaces():
    for name in ("vgg", "efficientnet-lite0=x", "ViT-Q-99=x.pt"):
        with pytest.raises(UserError, match="there is no feature space"):
            make_space(name)
