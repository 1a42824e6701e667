"""Is what is drawn and trained still what it was, bit for bit? For changes that are to change nothing.

    python tests/unchanged.py pictures --keep runs/pictures.json     before
    python tests/unchanged.py pictures --compare runs/pictures.json  after: exit code 1 and names, if a bit differs

`pictures` draws some forty cases: each sampler, guidance of each kind, masks, LoRA and embedding, odd sizes, random
models in Stable Diffusion's v1 and v2 layouts. `training` runs 30 steps of each script's tiny recipe on the fixture,
and keeps each step's loss and the hash of the last weights. Figures hold for one machine and one version of torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from checkpoints.small_models import SMALL, random_states

import ldm
from ldm.backends import packed
from ldm.files import atomic_write
from ldm.jobs import Settings, catalogue

ROOT = Path(__file__).parents[1]
PROMPT = "a red heart, flat emoji"
Case = tuple[str, Callable[[], torch.Tensor]]
SAID = {"steps": 3, "cfg": 3.0, "sampler": "ddim", "spacing": "trailing"}  # whatever the defaults are


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pictures", "training"])
    parser.add_argument("--keep", metavar="FILE")
    parser.add_argument("--compare", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    packed.available = lambda dtype: False  # layers as torch has them, whose last bits are told
    with tempfile.TemporaryDirectory() as folder:
        found = pictures(Path(folder)) if arguments.what == "pictures" else training(Path(folder))
    if arguments.keep:
        with atomic_write(arguments.keep) as temporary:
            Path(temporary).write_text(json.dumps(found, indent=1))
    before = json.loads(Path(arguments.compare).read_text()) if arguments.compare else found
    changed = [name for name in found if name in before and found[name] != before[name]]
    new = len(found.keys() - before.keys())
    print(f"{len(found)} cases, {new} of them new, {len(changed)} changed", *changed, sep="\n  ")
    return 1 if changed else 0


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().float().numpy().tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------- pictures


def pictures(folder: Path) -> dict[str, str]:
    return {name: sha(draw()) for name, draw in cases(folder)}


def cases(folder: Path) -> Iterator[Case]:
    icons = ldm.load("icons", device="cpu")

    def of(model: ldm.LatentDiffusion, negative: str = "", n: int = 1, **settings: object) -> torch.Tensor:
        chosen = Settings(**{**SAID, **settings})  # type: ignore[arg-type]
        return model.txt2img(PROMPT, negative=negative, seed=5, n=n, settings=chosen)

    for name in catalogue.SAMPLERS:
        cfg = 0.6 if catalogue.SAMPLERS[name].unguided else 3.0
        yield f"sampler {name}", lambda name=name, cfg=cfg: of(icons, sampler=name, cfg=cfg)
    for spacing in sorted(catalogue.GRIDS.keys() - {"ays_svd"}):  # which has levels that this model does not know
        yield f"grid {spacing}", lambda spacing=spacing: of(icons, sampler="dpmpp_2m", spacing=spacing)
    yield "cfg 1", lambda: of(icons, cfg=1.0)
    yield "cfg 7.5, negative, three pictures", lambda: of(icons, negative="green", cfg=7.5, n=3)
    yield "rescale", lambda: of(icons, cfg=7.5, cfg_rescale=0.7)
    yield "interval", lambda: of(icons, cfg=7.5, cfg_interval=(0.5, 5.0))
    yield "eta", lambda: of(icons, eta=0.6)
    yield "sigmas", lambda: of(icons, sampler="euler", sigmas=(14.0, 5.0, 1.0, 0.0))
    yield "perpendicular negative", lambda: of(icons, negative="green", perp_negative=1.0)
    yield "guide model", lambda: of(icons, guide_model="icons")
    yield "static threshold", lambda: of(icons, threshold="static")
    yield "dynamic threshold", lambda: of(icons, threshold="dynamic", threshold_bound=2.0)
    yield "odd size, tiles", lambda: of(icons, width=96, height=72, tile=48)
    yield "img2img", lambda: icons.img2img(picture(icons), PROMPT, strength=0.6, seed=5, settings=five())
    yield (
        "img2img in tiles",
        lambda: icons.img2img(picture(icons), PROMPT, strength=0.6, seed=5, settings=five(tile=32)),
    )
    yield "mask", lambda: icons.img2img(picture(icons), PROMPT, mask=mask(), strength=1.0, seed=5, settings=five())
    yield "classifier", lambda: of(icons, classifier=classifier(icons, folder), classifier_class="b")
    lora, word = adapters(icons, folder)
    yield "lora", lambda: of(ldm.load("icons", device="cpu").adapted(loras={lora: 0.8}))
    changed = ldm.load("icons", device="cpu").adapted(embeddings=[word])
    yield "embedding", lambda: changed.txt2img("a <thing>", seed=5, settings=Settings(**SAID))
    for kind, layout in (("v1", "single"), ("v1", "folder"), ("v2", "single"), ("v2", "folder")):
        yield f"random {kind}, {layout}", lambda kind=kind, layout=layout: of(foreign(kind, layout, folder))


def five(**settings: object) -> Settings:
    return Settings(**{**SAID, "steps": 5, **settings})  # type: ignore[arg-type]


def picture(model: ldm.LatentDiffusion) -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def mask() -> torch.Tensor:
    area = torch.zeros(1, 1, 64, 64)
    area[..., :32] = 1
    return area


def classifier(model: ldm.LatentDiffusion, folder: Path) -> str:
    from ldm.guidance.latents import latent_probe
    from ldm.guidance.noisy_classifier import NoisyClassifier, NoisyClassifierConfig, save_noisy_classifier

    torch.manual_seed(0)
    config = NoisyClassifierConfig(("a", "b"), model.codec.latent_channels, latent_probe(model.codec), 32)
    save_noisy_classifier(NoisyClassifier(config), folder / "classifier")
    return str(folder / "classifier")


def adapters(model: ldm.LatentDiffusion, folder: Path) -> tuple[str, str]:
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(1)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    width, context = model.unet.config.channels * model.unet.config.multipliers[-1], model.unet.config.context_width
    factors = {
        f"{name}.lora_down.weight": torch.randn(4, context, generator=random),
        f"{name}.lora_up.weight": torch.randn(width, 4, generator=random),
        f"{name}.alpha": torch.tensor(4.0),
    }
    save_file(factors, folder / "lora.safetensors")
    assert model.config.text is not None
    vectors = torch.randn(2, model.config.text.width, generator=random)
    save_file({"<thing>": vectors}, folder / "word.safetensors")
    return str(folder / "lora.safetensors"), str(folder / "word.safetensors")


def foreign(kind: str, layout: str, folder: Path) -> ldm.LatentDiffusion:
    """A random model in the architecture of Stable Diffusion v1 or v2, narrow, written and read in a foreign layout."""
    from dataclasses import replace

    from ldm.checkpoints import export

    config = SMALL
    if kind == "v1":
        assert config.text is not None and config.unet is not None
        text = replace(config.text, layer="last", padding="eot", quick_gelu=True, cleaning="plain", embed_dim=0)
        unet = replace(config.unet, heads=1, head_width=0, linear_projection=False)
        config = replace(config, text=text, unet=unet, parameterization="eps")
    path = folder / f"{kind}-{layout}{'.safetensors' if layout == 'single' else ''}"
    export.write(path, config, random_states(config), "original" if layout == "single" else "diffusers")
    said = {"parameterization": config.parameterization, "image_size": 16}
    return ldm.load(path, device="cpu", settings=said)


# ---------------------------------------------------------------- training


def training(folder: Path) -> dict[str, object]:
    ae, clip, model = (folder / name for name in ("ae", "clip", "ldm"))
    train(ae, "autoencoder", "--config", str(ROOT / "configs/autoencoder/tiny.yaml"))
    train(clip, "clip", "--config", str(ROOT / "configs/clip/tiny.yaml"))
    recipe = str(ROOT / "configs/diffusion/tiny.yaml")
    train(model, "diffusion", "--config", recipe, f"autoencoder={ae}", f"text={clip}", "sample.prompts=[]")
    small = [f"init={model}", "data.size=64", "data.streams=4", "data.workers=0", "loop.global_batch=8"]
    train(folder / "lora", "diffusion", *small, "lora.rank=2")
    train(folder / "word", "embedding", *small, "begin_with=red")
    found: dict[str, object] = {}
    for run in ("ae", "clip", "ldm", "lora", "word"):
        lines = [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]
        found[f"{run} losses"] = [line["loss"] for line in lines if "loss" in line]
        for file in sorted((folder / run).glob("*.safetensors")):
            found[f"{run} {file.stem}"] = weights(file)
    return found


AS_TORCH = """
import runpy, sys
from ldm.backends import packed
packed.available = lambda dtype: False
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(output: Path, stage: str, *words: str) -> None:
    shards = [f"data.shards={ROOT}/tests/fixtures/icons/train-*.tar"]
    loop = ["loop.steps=30", "loop.log_every=1", "loop.threads=1", "loop.sample_every=0"]
    script = str(ROOT / f"scripts/train_{stage}.py")
    command = [sys.executable, "-c", AS_TORCH, script, *words, *shards, *loop, f"output={output}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def weights(file: Path) -> str:
    """Of names and numbers alone: what stands in a file's metadata may change."""
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for key, value in sorted(load_file(file).items()):
        digest.update(key.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
