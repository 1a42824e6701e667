"""What foreign files of Stable Diffusion XL leave unsaid: a U-Net that takes a vector is read as one of these.

Podell et al. 2023, and the published configurations: the base has two towers, CLIP ViT-L and OpenCLIP ViT-bigG; the
refiner has the second alone, and is told an aesthetic score in place of the target size. The context is the last block
but one of each, without the final norm; the vector begins with the projected feature of the tower that projects.
"""

from __future__ import annotations

from dataclasses import replace

from ldm.errors import UserError
from ldm.model_config import EncoderConfig, ModelConfig, UNetConfig

SCALE = 0.13025  # latent = its autoencoder's times this
SIDE = 1024  # pixels


def is_xl(config: ModelConfig) -> bool:
    """Whether the U-Net is told a vector, as those of XL are."""
    return isinstance(config.unet, UNetConfig) and config.unet.vector_width > 0


def completed(config: ModelConfig, where: object, scaled: bool = False) -> ModelConfig:
    """`config`, made of shapes, with how the towers are read and what the vector is made of, and the latent's scale
    unless it is said (`scaled`). Raises UserError for a vector that cannot be made of these towers."""
    unet = config.unet
    assert isinstance(unet, UNetConfig)
    if config.autoencoder is not None and not scaled:
        config = replace(config, autoencoder=replace(config.autoencoder, scale=(SCALE,)))
    if not config.towers:
        return config
    wide = sum(tower.width for tower in config.towers.values())
    if wide < unet.context_width and len(config.towers) == 1:
        missing = "first" if config.text is not None and config.text.embed_dim else "second"
        raise UserError(
            f"{where} has one text tower, {wide} wide, and its U-Net reads {unet.context_width} numbers a token: the "
            f"{missing} of Stable Diffusion XL's two is missing; copy the model again, with both"
        )
    towers = {name: replace(tower, layer="penultimate", final_norm=False) for name, tower in config.towers.items()}
    refiner = len(towers) == 1
    numbers, pooled = 5 if refiner else 6, sum(tower.embed_dim for tower in towers.values())
    width, rest = divmod(unet.vector_width - pooled, numbers)
    if not pooled or width < 2 or width % 2 or rest:
        raise UserError(
            f"the U-Net in {where} is told a vector of {unet.vector_width} numbers, and with a pooled text of "
            f"{pooled} there is no room in it for {numbers} sizes, as Stable Diffusion XL has them"
        )
    encoder = EncoderConfig(pooled=True, sizes=width, score=refiner, empty="encoded" if refiner else "zeros")
    return replace(config, **towers, encoder=encoder)


def unsayable(config: ModelConfig) -> list[str]:
    """What of a model with a vector is not as XL has it, so that foreign files have no words for it; names settings."""
    found, encoder = [], config.encoder
    *others, last = config.towers.values() or (None,)
    if last is None or not last.embed_dim or any(tower is not None and tower.embed_dim for tower in others):
        found.append("text towers of which not the last alone has a projection (embed_dim)")
    if not encoder.pooled or not encoder.sizes:
        found.append(f"encoder.pooled={encoder.pooled}, encoder.sizes={encoder.sizes}")
    if encoder.score != (not others):
        found.append(f"encoder.score={encoder.score} with {len(config.towers)} text towers")
    for name, tower in config.towers.items():
        if tower.layer != "penultimate" or tower.final_norm:
            found.append(f"{name}.layer={tower.layer}, {name}.final_norm={tower.final_norm}")
    return found
