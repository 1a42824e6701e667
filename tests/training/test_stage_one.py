"""Stage one: the discriminator really plays, in its time and for its own gradient; the latents come out unscaled."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.checkpoints.opening import open_checkpoint
from ldm.config import AutoencoderConfig
from ldm.data.loader import Loader
from ldm.errors import UserError
from ldm.training.draws import Draws
from ldm.training.stage_one import AutoencoderStage
from ldm.training.state import load_state

from .toys import AUTOENCODER, CPU, LOOP, log_of, run


def stage_of(config=AUTOENCODER) -> AutoencoderStage:
    return AutoencoderStage(config, 0, 1, CPU)


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def first_losses(config, step: int):
    """The stage, its first batch, and the iterator over its losses at `step`."""
    stage = stage_of(config)
    batch = next(iter(stage.batches))
    networks = {name: player.module for name, player in stage.players.items()}
    return stage, stage.losses(batch, Draws(0, step, batch.key), step, networks)


class Watched(AutoencoderStage):
    """Keeps the discriminator's weights as they are when each step begins."""

    kept: list[torch.Tensor]

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.kept = []

    def losses(self, batch, draws, step, networks):
        assert self.discriminator is not None
        self.kept.append(flat(self.discriminator))
        yield from super().losses(batch, draws, step, networks)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watched]:
    """A whole run of six steps, the discriminator in it from step 2 on."""
    path = tmp_path_factory.mktemp("autoencoder")
    stage = Watched(AUTOENCODER, 0, 1, CPU)
    run(stage, replace(LOOP, log_every=1), path, AUTOENCODER)
    return path, stage


def test_the_discriminator_is_stepped_from_its_start_on_and_not_before(finished):
    path, stage = finished
    assert stage.discriminator is not None
    before, at_start, after, end = stage.kept[0], stage.kept[2], stage.kept[3], flat(stage.discriminator)
    assert torch.equal(before, at_start)  # after steps 0 and 1
    assert not torch.equal(at_start, after)  # adversarial_start = 2
    assert not torch.equal(after, end)
    played = ["discriminator" in line for line in log_of(path) if "loss" in line]
    assert played == [False, False, True, True, True, True]
    found = load_state(path)
    assert found is not None
    assert set(found[1]["averages"]) == {"autoencoder"}  # nobody reads an averaged discriminator
    assert set(found[1]["modules"]) == set(found[1]["optimizers"]) == {"autoencoder", "discriminator"}


def test_the_ramp_rises_from_the_start():
    config = replace(AUTOENCODER, loss=replace(AUTOENCODER.loss, adversarial_ramp=4, adaptive_max=0.01))
    weights = []
    for step in (3, 4, 6, 9):
        _, losses = first_losses(config, step)
        weights.append(float(next(losses)[2]["adversarial_weight"]))
    # adaptive weight at its clamp, times the ramp, times loss.adversarial
    assert weights == pytest.approx([0.01 * share * 0.5 for share in (0.25, 0.5, 1.0, 1.0)])


def test_each_gradient_is_the_network_s_own():
    stage, losses = first_losses(AUTOENCODER, 2)
    assert stage.discriminator is not None
    name, loss, _ = next(losses)
    assert name == "autoencoder"
    loss.backward()
    assert all(p.grad is None for p in stage.discriminator.parameters())
    assert all(p.requires_grad for p in stage.discriminator.parameters())
    gradients = [p.grad.clone() for p in stage.autoencoder.parameters()]
    name, loss, _ = next(losses)
    assert name == "discriminator"
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in stage.discriminator.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(stage.autoencoder.parameters(), gradients, strict=True))
    assert next(losses, None) is None


def test_the_adversarial_gradient_reaches_the_autoencoder():
    """At the same weights, with and without the discriminator's opinion."""
    gradients = []
    for step in (0, 2):
        stage, losses = first_losses(AUTOENCODER, step)
        next(losses)[1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in stage.autoencoder.parameters()]))
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)


@pytest.mark.parametrize("clamp", [1e-3, 1e9])
def test_the_adaptive_weight_is_the_ratio_of_gradients_clamped_and_logged(clamp):
    config = replace(AUTOENCODER, loss=replace(AUTOENCODER.loss, adaptive_max=clamp))
    stage, losses = first_losses(config, 2)
    _, loss, logs = next(losses)
    weight = float(logs["adversarial_weight"])
    last = stage.autoencoder.decoder.last_layer.weight
    (of_gan,) = torch.autograd.grad(logs["adversarial"], last, retain_graph=True)
    (of_all,) = torch.autograd.grad(loss, last, retain_graph=True)
    of_reconstruction = of_all - weight * of_gan
    ratio = float(of_reconstruction.norm() / (of_gan.norm() + 1e-4))
    assert weight == pytest.approx(0.5 * min(ratio, clamp), rel=1e-3)


def test_exported_latents_of_the_training_data_have_mean_0_and_variance_1_in_every_channel(finished):
    codec = open_checkpoint(finished[0]).load("autoencoder")
    assert len(codec.config.shift) == len(codec.config.scale) == 3
    batches = iter(Loader(AUTOENCODER.data, 48, 0, 1, LOOP.seed))
    batch = next(batches)  # one epoch, the samples over which `measure` went
    assert len(set(batch.key)) == 48
    with torch.no_grad():
        mode = codec.encode(batch.image).double()
        noise = Draws(0, 0, batch.key).normal("posterior", codec.latent_shape(16, 16))
        latent = codec.encode(batch.image, noise).double()
        spread = (
            codec.posterior(batch.image).logvar.double().exp() * torch.tensor(codec.config.scale).view(1, -1, 1, 1) ** 2
        )
    # In expectation over the posterior to rounding, for one draw to its sampling error.
    assert mode.mean((0, 2, 3)).abs().max() < 1e-5
    assert ((mode.square() + spread).mean((0, 2, 3)) - 1).abs().max() < 1e-5
    assert latent.mean((0, 2, 3)).abs().max() < 0.03
    assert (latent.var((0, 2, 3)) - 1).abs().max() < 0.05


def test_the_exported_weights_are_the_averaged_ones(finished):
    path, _ = finished
    found = load_state(path)
    assert found is not None
    average = found[1]["averages"]["autoencoder"]["average"]
    exported = dict(open_checkpoint(path).state("autoencoder"))
    assert {f"autoencoder.{key}" for key in exported} == set(average)
    assert all(torch.equal(tensor, average[f"autoencoder.{key}"]) for key, tensor in exported.items())


def test_two_steps_and_two_more_are_four(tmp_path):
    """The real stage, both players and the loader, bit for bit."""
    loop = replace(LOOP, steps=4, log_every=1, save_every=2)
    config = replace(AUTOENCODER, loop=loop, loss=replace(AUTOENCODER.loss, adversarial_start=1))
    run(stage_of(config), loop, tmp_path / "whole", config)
    half = replace(loop, steps=2)
    run(stage_of(config), half, tmp_path / "parts", config)
    run(stage_of(config), loop, tmp_path / "parts", config)
    a, b = load_state(tmp_path / "whole"), load_state(tmp_path / "parts")
    assert a is not None and b is not None
    for group in ("modules", "averages"):
        for name in a[1][group]:
            one, two = a[1][group][name], b[1][group][name]
            one, two = one.get("average", one), two.get("average", two)
            assert all(torch.equal(one[key], two[key]) for key in one)
    steps = [[line for line in log_of(tmp_path / run_) if "loss" in line] for run_ in ("whole", "parts")]
    assert steps[0] == steps[1]


def test_validation_is_deterministic_and_figures_are_those_of_the_pictures():
    stage = stage_of()
    with torch.no_grad():
        first, second = stage.validate(), stage.validate()
    assert first == second
    assert set(first) == {"validation/psnr", "validation/ssim", "validation/kl"}
    assert stage_of(replace(AUTOENCODER, data=replace(AUTOENCODER.data, validation=""))).validate() == {}


def test_the_identity_codec_has_nothing_to_train():
    config = replace(AUTOENCODER, model=AutoencoderConfig(kind="identity"))
    with pytest.raises(UserError, match="the identity codec has nothing to train"):
        stage_of(config)


def test_a_size_that_f_does_not_divide_is_refused():
    with pytest.raises(UserError, match="multiples of 2"):
        stage_of(replace(AUTOENCODER, data=replace(AUTOENCODER.data, size=15)))


def test_compiling_and_the_adaptive_weight_exclude_each_other():
    with pytest.raises(UserError, match=r"loop\.compile does not go with loss\.adversarial"):
        stage_of(replace(AUTOENCODER, loop=replace(LOOP, compile=True)))


@pytest.mark.slow
def test_compiled_networks_learn_the_same(tmp_path):
    """Losses agree, not each weight: Adam makes a whole step of a gradient that is zero but for rounding."""
    losses = []
    for compiled in (False, True):
        loop = replace(LOOP, steps=4, log_every=1, compile=compiled)
        config = replace(AUTOENCODER, loop=loop, loss=replace(AUTOENCODER.loss, adversarial=0.0))
        run(stage_of(config), loop, tmp_path / str(compiled), config)
        losses.append([line["loss"] for line in log_of(tmp_path / str(compiled)) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    decoded = open_checkpoint(tmp_path / "True").load("autoencoder").decode(torch.zeros(1, 3, 8, 8))
    assert bool(decoded.isfinite().all())


def begun_with(finished, **changes):
    """What a training says that begins with the autoencoder of the finished run."""
    loss = replace(AUTOENCODER.loss, adversarial=0.0)
    return replace(AUTOENCODER, init=str(finished[0]), model=AutoencoderConfig(), loss=loss, **changes)


def test_a_run_begins_with_the_autoencoder_of_init_and_measures_its_latents_anew(finished, tmp_path):
    stage = stage_of(begun_with(finished))
    theirs = open_checkpoint(finished[0]).load("autoencoder")
    assert torch.equal(flat(stage.autoencoder), flat(theirs.autoencoder))
    assert all(p.requires_grad for p in stage.autoencoder.parameters())
    run(stage, LOOP, tmp_path, begun_with(finished))
    ours = open_checkpoint(tmp_path).load("autoencoder")
    assert not torch.equal(flat(ours.autoencoder.encoder), flat(theirs.autoencoder.encoder))
    assert ours.config.shift != theirs.config.shift
    assert replace(ours.config, shift=(0.0,), scale=(1.0,)) == replace(theirs.config, shift=(0.0,), scale=(1.0,))


def test_a_decoder_by_itself_leaves_the_latents_as_they_are(finished, tmp_path):
    config = begun_with(finished, decoder_only=True)
    run(stage_of(config), LOOP, tmp_path, config)
    ours, theirs = (open_checkpoint(folder).load("autoencoder") for folder in (tmp_path, finished[0]))
    image = next(iter(Loader(AUTOENCODER.data, 4, 0, 1, 0))).image
    assert torch.equal(ours.encode(image), theirs.encode(image))
    assert not torch.equal(flat(ours.autoencoder.decoder), flat(theirs.autoencoder.decoder))
    assert ours.config == theirs.config


def test_what_contradicts_the_autoencoder_of_init_is_refused(finished):
    config = begun_with(finished)
    other = replace(config, model=AutoencoderConfig(latent_channels=5))
    with pytest.raises(UserError, match=r"model.latent_channels is 5, and that of the model .* is 3; leave it out"):
        stage_of(other)
    with pytest.raises(UserError, match=r"model.latent_channels is 4, and that of the model .* is 3"):
        AutoencoderStage(config, 0, 1, CPU, {"model.latent_channels"})
    with pytest.raises(UserError, match="init names none"):
        stage_of(replace(AUTOENCODER, decoder_only=True))


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_a_shrunk_latent_is_to_decode_to_the_shrunk_picture(chance):
    """By an autoencoder that gives each picture back, shrunk or not, so only the right picture has no error."""
    loss = replace(AUTOENCODER.loss, adversarial=0.0, perceptual=0.0, l1=1.0, gradient=0.0, kl=0.0, shrunk=chance)
    stage = stage_of(replace(AUTOENCODER, loss=loss))
    batch = next(iter(stage.batches))
    sizes = []

    def exact(image, noise, size):
        sizes.append(size)
        small = (
            image
            if size is None
            else torch.nn.functional.interpolate(
                image, [stage.codec.factor * side for side in size], mode="bilinear", antialias=True
            )
        )
        return small, torch.zeros(len(image), 2 * noise.shape[1], *noise.shape[2:])

    networks = {"autoencoder": exact}
    height = stage.latent_shape[1]
    for step in range(20):
        ((_, value, _),) = stage.losses(batch, Draws(0, step, batch.key), step, networks)  # type: ignore[arg-type]
        assert value < 1e-6
    expected = {(side, side) for side in (height // 4, height // 2, 3 * height // 4)} if chance else {None}
    assert set(sizes) == expected
    again = stage._shrunk(Draws(0, 3, ["another"]), height, height)
    assert again == sizes[3]  # whoever's samples these are
