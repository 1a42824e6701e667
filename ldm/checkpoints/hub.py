"""Hugging Face's hub, when it is asked for by name: hf:owner/name, hf:owner/name@revision, hf:owner/name/file.

Only safetensors and settings are fetched, of the networks alone; huggingface_hub keeps them in its cache.
"""

from __future__ import annotations

import re
from pathlib import Path

from ldm.errors import UserError, first_line

FOLDERS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
SETTINGS = ("model_index.json", "config.json", "*/config.json", "scheduler/*.json", "tokenizer*/*.json", "model.json")
WEIGHTS = ("diffusion_pytorch_model", "model")  # as diffusers and transformers name them
_NAME = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>[\w./-]+\.(?:safetensors|ckpt)))?"
)


def fetch(name: str) -> Path:
    """The local path of a repository's checkpoint directory, or of one file in it, fetched if it is not there yet.

    The plain weights are taken; where a repository has none, its fp16 ones. Raises UserError without huggingface_hub,
    without the network, for a name that does not exist, and one that asks for a login.
    """
    found = _NAME.fullmatch(name)
    if found is None or ".." in name:
        raise UserError(f"'hf:{name}' is not of the form hf:owner/name, hf:owner/name@revision or hf:owner/name/file")
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise UserError("fetching from Hugging Face needs huggingface_hub: pip install -e '.[hub]'") from error
    repo, revision, file = found["repo"], found["revision"], found["file"]
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        patterns = [*SETTINGS, *_weights("")]
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
        if not any(folder.rglob("*.safetensors")):
            patterns = [*SETTINGS, *_weights(".fp16")]
            folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, EntryNotFoundError) as error:  # the hub's errors, and the network's below it
        raise _explain(error, name) from error
    if not any(folder.rglob("*.safetensors")):
        raise UserError(f"hf:{repo} has no weights as safetensors in the folders {', '.join(FOLDERS)}; name another")
    return folder


def _weights(variant: str) -> list[str]:
    """Patterns of a variant's weights: whole, or in shards with their index."""
    found = []
    for folder in (*(f"{name}/" for name in FOLDERS), ""):
        for stem in WEIGHTS:
            found += [f"{folder}{stem}{variant}.safetensors", f"{folder}{stem}{variant}-*-of-*.safetensors"]
            found.append(f"{folder}{stem}.safetensors.index{variant}.json")
    native = [f"{name}.safetensors" for name in ("autoencoder", "text", "text_2", "t5", "unet")]
    return found if variant else found + native


def _explain(error: Exception, name: str) -> UserError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return UserError(f"hf:{name} is given only to those who accept its terms; do so on its page, and log in")
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError"}:
        return UserError(f"Hugging Face has no hf:{name}, or it is private; check the name")
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "TimeoutError"}:
        return UserError(f"hf:{name} is not in the cache and Hugging Face cannot be reached; check the network")
    return UserError(f"fetching hf:{name} failed ({first_line(error)})")
