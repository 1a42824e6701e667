"""hf:owner/name, without the network: what is asked of huggingface_hub, and what is said when it cannot."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.checkpoints import export
from ldm.checkpoints.hub import fetch
from ldm.errors import UserError
from ldm.find import find

from .small_models import SMALL, random_states

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that plays the repository: a snapshot links those of its files that the patterns allow."""
    folder = tmp_path / "remote"
    export.write(folder, SMALL, random_states(SMALL), "diffusers")
    for name in ("safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin", "model.ckpt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never fetched")

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        local = tmp_path / f"{repo.replace('/', '--')}@{revision}"
        for file in folder.rglob("*"):
            name = str(file.relative_to(folder))
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                if not (local / name).exists():
                    (local / name).symlink_to(file)  # as the hub's cache does
        return str(local)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return folder


def test_a_repository_is_fetched_and_opened(remote: Path):
    from ldm.checkpoints.opening import open_checkpoint

    path = find("hf:someone/model@v1.0")
    assert path.name == "someone--model@v1.0"
    assert open_checkpoint(path).config.unet == SMALL.unet
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert not any(name.endswith((".bin", ".ckpt")) or name.startswith("safety") for name in names)


def test_all_that_a_pipeline_is_read_from_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """XL's second tokenizer says what its tower pads with; Stable Diffusion 3's network is a transformer."""
    asked: list[str] = []

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError):  # there is nothing
        fetch("someone/model")
    network = "diffusion_pytorch_model.safetensors"
    names = [f"{folder}/{network}" for folder in ("unet", "transformer", "vae")]
    for end in ("", "_2"):
        names += [f"text_encoder{end}/model.safetensors", f"text_encoder{end}/config.json"]
        names += [f"tokenizer{end}/{name}.json" for name in ("tokenizer_config", "special_tokens_map", "vocab")]
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in asked) for name in names)
    names += ["text_encoder_3/model-00001-of-00002.safetensors", "text_encoder_3/model.safetensors.index.json"]
    names.append("tokenizer_3/tokenizer.json")
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in asked) for name in names[-3:])
    assert not any(fnmatch.fnmatch("text_encoder_3/model.bin", pattern) for pattern in asked)


def test_fp16_is_fetched_where_there_is_nothing_else(remote: Path):
    for file in [*remote.rglob("diffusion_pytorch_model.safetensors"), remote / "text_encoder/model.safetensors"]:
        file.rename(file.with_suffix(".fp16.safetensors"))
    found = fetch("someone/model")
    assert (found / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()


def test_a_repository_without_weights(remote: Path):
    for file in remote.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="no weights as safetensors"):
        fetch("someone/model")


def test_one_file_of_a_repository(monkeypatch: pytest.MonkeyPatch):
    def hf_hub_download(repo: str, file: str, revision: str | None) -> str:
        return f"/cache/{repo}/{file}@{revision}"

    monkeypatch.setattr(hub, "hf_hub_download", hf_hub_download)
    assert fetch("a/b/sd/v1.safetensors") == Path("/cache/a/b/sd/v1.safetensors@None")
    assert fetch("a/b@main/v1.ckpt") == Path("/cache/a/b/v1.ckpt@main")


@pytest.mark.parametrize(
    "name", ["", "model", "a/b/c", "../b", "a/b@../c", "a/b/../c.ckpt", "a b/c", "a/b/x.bin", "https://a/b"]
)
def test_names_that_are_none(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="not of the form"):
        fetch(name)


def test_errors_are_sentences(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import errors

    def failing(error: BaseException) -> Any:
        def fail(*arguments: Any, **options: Any) -> None:
            raise error

        return fail

    class Gated(errors.GatedRepoError):
        def __init__(self) -> None:
            pass

    class Missing(errors.RepositoryNotFoundError):
        def __init__(self) -> None:
            pass

    cases = [
        (errors.LocalEntryNotFoundError("no"), "check the network"),
        (errors.OfflineModeIsEnabled("no"), "check the network"),
        (Gated(), "log in"),
        (Missing(), "check the name"),
        (OSError(28, "No space left on device"), "No space left"),
    ]
    for error, words in cases:
        monkeypatch.setattr(hub, "snapshot_download", failing(error))
        with pytest.raises(UserError, match=words):
            fetch("a/b")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hub\]"):
        fetch("a/b")


def test_nothing_is_fetched_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="hf:someone/model would fetch it"):
        find("someone/model")
