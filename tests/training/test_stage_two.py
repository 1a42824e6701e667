"""Stage two, mostly as a pixel model (the identity codec), which needs no stage one."""

import math
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ldm
from ldm.checkpoints import native
from ldm.conditioning.condition import Condition
from ldm.config import DiffusionTraining, EncoderConfig, FiguresConfig, ModelConfig, SampleConfig, TextConfig
from ldm.errors import UserError
from ldm.training.draws import Draws
from ldm.training.stage_two import DiffusionStage, diffusion_stage

from .toys import CPU, ICONS, LOOP, PIXELS, log_of, run

TEXT = TextConfig(
    context_length=16, token_ids=(0, *range(300, 1300), 49406, 49407), width=32, heads=2, layers=1, embed_dim=16
)


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text tower with random weights, as train_clip.py would leave it."""
    from ldm.conditioning.clip import TextTower

    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    native.save(path, ModelConfig(text=TEXT), {"text": TextTower(TEXT)})
    return str(path)


@pytest.fixture
def pixels(tower: str) -> DiffusionTraining:
    return replace(PIXELS, text=tower)


class Spy(nn.Module):
    """A network that remembers what it was given and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.x: list[Tensor] = []
        self.t: list[Tensor] = []
        self.context: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, told: Condition) -> Tensor:
        self.x.append(x)
        self.t.append(t)
        assert told.context is not None
        self.context.append(told.context)
        return x * self.weight


def spied(config: DiffusionTraining, steps: int) -> tuple[DiffusionStage, Spy]:
    """What the network is given in the first `steps` steps on the same eight samples."""
    stage, spy = diffusion_stage(config, 0, 1, CPU), Spy()
    batch = next(iter(stage.batches))
    for step in range(steps):
        list(stage.losses(batch, Draws(0, step, batch.key), step, {"unet": spy}))
    return stage, spy


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_captions_dropped_to_the_empty_prompt(pixels, share):
    """Within four standard deviations; a dropped row is the empty prompt's context exactly."""
    steps = 40 if 0 < share < 1 else 2
    config = replace(pixels, loss=replace(pixels.loss, caption_dropout=share))
    stage, spy = spied(config, steps)
    assert stage.model.text is not None
    null = stage.model.text.encode([""])
    dropped = torch.stack([(context == null).all(2).all(1) for context in spy.context]).double()
    assert dropped.numel() == 8 * steps
    deviation = math.sqrt(share * (1 - share) / dropped.numel())
    assert abs(float(dropped.mean()) - share) <= 4 * deviation
    if share == 0.3:
        assert bool(((dropped.mean(0) > 0) & (dropped.mean(0) < 1)).all())  # not always the same samples
    batch = next(iter(diffusion_stage(config, 0, 1, CPU).batches))
    captions = stage.model.text.encode(batch.caption)
    for row in range(8):
        expected = null[0] if dropped[0, row] else captions[row]
        assert torch.equal(spy.context[0][row], expected)


def test_a_share_beyond_1_is_refused(pixels):
    with pytest.raises(UserError, match=r"loss\.caption_dropout must be at least 0 and at most 1, not 10"):
        diffusion_stage(replace(pixels, loss=replace(pixels.loss, caption_dropout=10.0)), 0, 1, CPU)


def test_levels_are_drawn_anew_for_every_sample_and_step_over_the_whole_range(pixels):
    stage, spy = spied(pixels, 40)
    t = torch.stack(spy.t)
    assert len(t.unique()) > 0.8 * t.numel()
    assert float(t.min()) < 60 and float(t.max()) > 940
    assert stage.model.law.schedule.steps == 1000
    # x_in = c_in (x0 + sigma n) has about unit variance at high noise, whatever the level
    high = torch.cat(spy.x)[t.flatten() > 700]
    assert abs(float(high.var()) - 1) < 0.1


def test_it_learns_samples_and_is_read_back(pixels, tmp_path):
    """The identity codec trains and samples with the same classes: 40 steps on 48 icons of 8 px."""
    loop = replace(LOOP, steps=40, global_batch=16, log_every=10, save_every=40, validate_every=20)
    config = replace(pixels, loop=loop, sample=replace(pixels.sample, prompts=("a red heart",), steps=2))
    stage = diffusion_stage(config, 0, 1, CPU)
    with torch.no_grad():
        before = stage.validate()
        assert before == stage.validate()  # the same noise and levels each time
    smaller = diffusion_stage(replace(config, loop=replace(loop, global_batch=4)), 0, 1, CPU)
    with torch.no_grad():
        assert smaller.validate()["validation/loss"] == pytest.approx(before["validation/loss"], rel=1e-5)
    run(stage, loop, tmp_path, config)

    after = [line["validation/loss"] for line in log_of(tmp_path) if "validation/loss" in line]
    assert len(after) == 2
    assert after[-1] < 0.75 * before["validation/loss"]
    losses = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    assert losses[-1] < 0.75 * losses[0]
    assert (tmp_path / "samples" / "00000040.png").exists()

    model = ldm.load(tmp_path, device="cpu")
    assert model.config.autoencoder is not None and model.config.autoencoder.kind == "identity"
    assert (model.config.parameterization, model.config.image_size) == ("v", 8)
    image = model.txt2img("a red heart", cfg=2.0, steps=3, seed=1)
    assert image.shape == (1, 3, 8, 8) and bool(image.isfinite().all()) and float(image.std()) > 0


def test_a_learned_variance_travels_and_the_samplers_draw_with_it(pixels, tmp_path):
    config = replace(
        pixels,
        model=replace(pixels.model, out_channels=6),
        learned_variance=True,
        loop=replace(LOOP, steps=1),
        sample=replace(pixels.sample, prompts=("a red heart",), steps=2),
    )
    run(diffusion_stage(config, 0, 1, CPU), config.loop, tmp_path, config)
    model = ldm.load(tmp_path, device="cpu")
    assert model.config.learned_variance and model.config.unet is not None and model.config.unet.out_channels == 6
    for sampler in ("ddim", "ddpm"):
        image = model.txt2img("a red heart", cfg=2.0, steps=3, seed=1, sampler=sampler)
        assert image.shape == (1, 3, 8, 8) and bool(image.isfinite().all())


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(pixels):
    found = []
    for checkpointing in (False, True):
        stage = diffusion_stage(replace(pixels, gradient_checkpointing=checkpointing), 0, 1, CPU)
        torch.manual_seed(1)
        for parameter in stage.model.unet.parameters():  # the zeros that a new network begins with hide gradients
            if not bool(parameter.detach().any()):
                nn.init.normal_(parameter, std=0.1)
        batch = next(iter(stage.batches))
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            ((_, loss, _),) = stage.losses(batch, Draws(0, 0, batch.key), 0, {"unet": stage.model.unet})
        loss.backward()
        gradients = [p.grad.clone() for p in stage.model.unet.parameters() if p.grad is not None]
        found.append((kept, float(loss.detach()), gradients))
    (plenty, loss, gradients), (little, same_loss, same_gradients) = found
    assert little < 0.5 * plenty
    assert same_loss == pytest.approx(loss, rel=1e-6)
    assert len(gradients) == len(same_gradients) > 0
    for a, b in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_and_draws(pixels, tmp_path):
    losses = []
    for compiled in (False, True):
        loop = replace(LOOP, steps=4, log_every=1, compile=compiled)
        config = replace(pixels, loop=loop, sample=replace(pixels.sample, prompts=("a red heart",), steps=2))
        run(diffusion_stage(config, 0, 1, CPU), loop, tmp_path / str(compiled), config)
        losses.append([line["loss"] for line in log_of(tmp_path / str(compiled)) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert (tmp_path / "True" / "samples" / "00000004.png").exists()
    assert ldm.load(tmp_path / "True", device="cpu").config.image_size == 8


def test_a_class_less_network_without_captions_trains_too(tmp_path):
    model = replace(PIXELS.model, context_width=0)
    config = replace(PIXELS, model=model, loop=replace(LOOP, steps=1))
    stage = diffusion_stage(config, 0, 1, CPU)
    run(stage, config.loop, tmp_path, config)
    assert native.read_config(tmp_path).text is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"in_channels": 5}, r"latents have 3; set model.in_channels=3 model.out_channels=3"),
        ({"context_width": 48}, r"the text tower's width is 32; set model.context_width=32"),
        ({"classes": 10}, r"model.classes is 10 and data.label is not set; say data.label=FIELD"),
        ({"vector_width": 8}, r"set model.vector_width=0"),
    ],
)
def test_parts_that_do_not_fit_are_named_with_the_setting_that_mends_it(pixels, model, words):
    with pytest.raises(UserError, match=words):
        diffusion_stage(replace(pixels, model=replace(pixels.model, **model)), 0, 1, CPU)


CLASSES = replace(
    PIXELS,
    model=replace(PIXELS.model, context_width=0, classes=2),
    encoder=EncoderConfig(labels=("noto", "fluent-flat")),
    data=replace(PIXELS.data, label="source"),
    loop=replace(LOOP, steps=1),
)


def test_a_class_conditional_network_is_told_labels_and_of_some_none():
    """The share of rows whose label becomes the null class is caption_dropout, to four standard deviations."""
    stage = diffusion_stage(CLASSES, 0, 1, CPU)
    told: list[Tensor] = []

    class Listener(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            assert condition.label is not None and set(condition.parts()) == {"label"}
            told.append(condition.label)
            return x

    batch = next(iter(stage.batches))
    for step in range(40):
        list(stage.losses(batch, Draws(0, step, batch.key), step, {"unet": Listener()}))
    rows, true = torch.stack(told), torch.tensor([["noto", "fluent-flat"].index(str(name)) for name in batch.label])
    assert 0 < int(true.sum()) < len(true) and bool(((rows == true) | (rows == 2)).all())
    share = CLASSES.loss.caption_dropout
    assert abs(float((rows == 2).double().mean()) - share) < 4 * math.sqrt(share * (1 - share) / rows.numel())


def test_pictures_with_a_label_and_no_caption_train_a_network_of_labels(tmp_path, pixels):
    shards = str(tmp_path / "x.tar")
    with tarfile.open(ICONS / "train-0000.tar") as given, tarfile.open(shards, "w") as made:
        for member in given:
            if member.isfile() and not member.name.endswith(".txt"):
                made.addfile(member, given.extractfile(member))
    data = replace(CLASSES.data, shards=shards, validation=shards)
    batch = next(iter(diffusion_stage(replace(CLASSES, data=data), 0, 1, CPU).batches))
    assert set(batch.label) == {"noto", "fluent-flat"}
    captioned = diffusion_stage(replace(pixels, data=replace(pixels.data, shards=shards, validation="")), 0, 1, CPU)
    with pytest.raises(UserError, match="no caption"):
        next(iter(captioned.batches))
    with pytest.raises(UserError, match=r"data\.caption is none, and the text tower reads captions"):
        diffusion_stage(replace(pixels, data=replace(pixels.data, caption="none")), 0, 1, CPU)


def test_classes_are_drawn_on_the_way(tmp_path):
    sample = SampleConfig(("a cat",), steps=2, labels=("noto", "fluent-flat", "noto"))
    config = replace(CLASSES, sample=sample, loop=replace(CLASSES.loop, sample_every=1))
    stage = diffusion_stage(config, 0, 1, CPU)
    assert "sample.prompts are not drawn, for the model takes none" in stage.notices
    run(stage, config.loop, tmp_path, config)
    with Image.open(tmp_path / "samples" / "00000001.png") as sheet:
        assert sheet.size == (3 * 8 + 2 * 2, 8)
    unseen = diffusion_stage(replace(CLASSES, sample=SampleConfig()), 0, 1, CPU)
    assert "no pictures are drawn on the way, for sample.labels is empty" in unseen.notices
    for labels, words in (
        (("cow",), "there is no label 'cow'; this model knows noto, fluent-flat"),
        (("",), "empty label"),
    ):
        with pytest.raises(UserError, match=f"the pictures of sample.labels cannot be drawn: .*{words}"):
            diffusion_stage(replace(CLASSES, sample=SampleConfig(labels=labels)), 0, 1, CPU)


def test_labels_that_a_network_does_not_know_are_bad_samples(caplog, tmp_path):
    """Left out and counted in training and in validation, not the end of the run."""
    one = replace(CLASSES, model=replace(CLASSES.model, classes=1), encoder=EncoderConfig(labels=("noto",)))
    few = replace(one, data=replace(one.data, bad_limit=0.9))
    stage = diffusion_stage(few, 0, 1, CPU)
    run(stage, few.loop, tmp_path, few)
    with torch.no_grad():
        assert math.isfinite(stage.validate()["validation/loss"])
    assert "its source is 'fluent-flat', and the network's labels are noto (the first is" in caplog.text
    assert ldm.load(tmp_path, "cpu").config.encoder.labels == ("noto",)
    numbered = replace(CLASSES, encoder=EncoderConfig())
    unvalidated = replace(numbered, data=replace(numbered.data, validation=""))
    with pytest.raises(UserError, match=r"48 of 48 samples .*'noto', and the network's labels are 0, 1"):
        next(iter(diffusion_stage(unvalidated, 0, 1, CPU).batches))
    with pytest.raises(UserError, match="none of the 12 samples"):
        diffusion_stage(numbered, 0, 1, CPU)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": 0}, r"encoder.labels has 2 names and the network 0 classes; set model.classes=2"),
        ({"classes": 3}, r"encoder.labels has 2 names and the network 3 classes; set model.classes=2"),
        ({"classes": 0, "labels": ()}, r"data.label=source is for a network with classes, and this one has none"),
        ({"labels": ("noto", "noto")}, r"encoder.labels has an empty name, or one name twice"),
    ],
)
def test_labels_and_classes_that_do_not_fit(changes, words):
    encoder = EncoderConfig(labels=changes.pop("labels", CLASSES.encoder.labels))
    with pytest.raises(UserError, match=words):
        diffusion_stage(replace(CLASSES, encoder=encoder, model=replace(CLASSES.model, **changes)), 0, 1, CPU)


def test_labels_are_those_of_the_model_that_a_training_goes_on_from(tmp_path):
    stage = diffusion_stage(CLASSES, 0, 1, CPU)
    run(stage, CLASSES.loop, tmp_path, CLASSES)
    more = DiffusionTraining(init=str(tmp_path), data=CLASSES.data, loop=CLASSES.loop)
    assert diffusion_stage(more, 0, 1, CPU).model.encoder.config == CLASSES.encoder
    with pytest.raises(UserError, match=r"encoder.labels is \['cat', 'dog'\], and that of the model"):
        diffusion_stage(replace(more, encoder=EncoderConfig(labels=("cat", "dog"))), 0, 1, CPU)


def test_an_attention_that_is_not_there(pixels):
    assert diffusion_stage(pixels, 0, 1, CPU).model.unet.attention_backend == "sdpa"
    with pytest.raises(UserError, match="'xformers' is not available here"):
        diffusion_stage(replace(pixels, attention="xformers"), 0, 1, CPU)


def test_figures_of_a_model_without_captions_are_refused_before_it_is_trained():
    config = replace(PIXELS, model=replace(PIXELS.model, context_width=0), figures=FiguresConfig(pictures=64))
    with pytest.raises(UserError, match=r"without a text tower draws none; set figures\.pictures=0"):
        diffusion_stage(config, 0, 1, CPU)


def test_captions_need_a_text_tower():
    with pytest.raises(UserError, match="no text tower is named; say text="):
        diffusion_stage(PIXELS, 0, 1, CPU)


def test_a_text_tower_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere"):
        diffusion_stage(replace(PIXELS, text=str(tmp_path / "nowhere")), 0, 1, CPU)
