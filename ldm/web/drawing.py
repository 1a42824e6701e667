"""One job drawn: previews as the sampler walks, then the pictures. Runs in the worker's thread."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import image_io, provenance
from ldm.errors import UserError
from ldm.web import attention, sent
from ldm.web.job import Job
from ldm.web.shelf import Shelf

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.canvas import Canvas
    from ldm.model import Model
    from ldm.sampling import Step

BATCH = 4  # as txt2img.py has it, so that the last bits are the same
SHARE = 0.2  # of the time, at most, goes into previews
OFTEN = 0.2  # seconds between two previews, at least
LOOKED = 16  # attention is shown of layers of so many positions either way, at most (Hertz et al. 2022)
PREVIEW_SIDE = 384  # pixels; larger ones are made smaller


@dataclass(frozen=True)
class Place:
    """How many are in front."""

    ahead: int


@dataclass(frozen=True)
class Walked:
    """A step done of `count` pictures, from `first` on; what they are going to be."""

    step: int
    steps: int
    first: int
    count: int
    previews: tuple[bytes, ...] = ()  # JPEG


@dataclass(frozen=True)
class Drawn:
    index: int
    seed: int
    png: bytes
    words: tuple[tuple[str, bytes], ...] = ()  # each word of the prompt, and where it is looked at: a grey PNG


@dataclass(frozen=True)
class Done:
    """All pictures are drawn; what the user should know of them."""

    notices: tuple[str, ...]
    seconds: float


Event = Place | Walked | Drawn | Done


class Stopped(Exception):
    """Nobody waits for this job any more."""


class Stop:
    """Whether a job has to end, asked within a step too, which may have any number of evaluations."""

    def __init__(self, seconds: float) -> None:
        self.asked = threading.Event()
        self._seconds = seconds
        self._end = float("inf")

    def begin(self) -> None:
        self._end = time.monotonic() + self._seconds

    def check(self) -> None:
        if self.asked.is_set():
            raise Stopped
        if time.monotonic() > self._end:
            raise UserError(
                f"the drawing took longer than {self._seconds:g} seconds, this server's limit; ask for fewer steps or "
                "a smaller size"
            )


def draw(
    job: Job, shelf: Shelf, stop: Stop, tell: Callable[[Event], None], previews: bool = True, folder: Path | None = None
) -> None:
    """Draw a job, and `tell` of it on the way. Raises UserError for what the model cannot do, and Stopped.

    Each picture is that of the command with its settings and seed, its PNG says how it was made; it is also written to
    `folder`, if there is one.
    """
    from ldm import edits, generate, redraw

    stop.begin()
    began, requests, model = time.monotonic(), job.requests, shelf.model_for(job.asked)
    job = replace(job, settings=job.settings.of(model.config.drawing))
    plan = shelf.with_paths(job.settings).plan()
    helpers = shelf.helpers_for(job.asked, model, plan)
    with _asking(stop.check):
        settings, made, inputs, notices = sent.canvas_of(job, model)
    notices += (*model.notices, *helpers.notices, *settings.without_effect(requests))
    for reader in (model, *helpers.readers):
        notices += generate.prompt_notices(reader, requests, plan.weighted)
    pace = _Pace()

    def watch(steps: Iterator[Step]) -> Step:
        for step in steps:
            last = step.index + 1 == step.total
            shown: tuple[bytes, ...] = ()
            if previews and not last and pace.due():
                with pace:
                    ahead = generate.decode(model, replace(step, x=step.x0, sigma_next=0.0), plan.tile).cpu()
                    shown = tuple(map(_small, ahead if made is None else _whole(made, ahead)))
            tell(Walked(step.index + 1, step.total, first, len(step.x), shown))
            stop.check()
            if last:
                return step
        raise AssertionError("a sampler yields as many steps as it says")

    ends = [stop.check]
    with ExitStack() as inside:
        maps = None
        if job.asked.attention:
            maps = inside.enter_context(edits.attention_maps(model, LOOKED))
            ends.append(partial(attention.bound, maps))
        inside.enter_context(_before_each(model, ends))
        for first in range(0, len(requests), BATCH):
            batch = requests[first : first + BATCH]
            if maps is not None:
                maps.clear()
            images = redraw.drawn(model, batch, plan, job.begin, made, helpers, watch)
            for index, request in enumerate(batch):
                record = provenance.record(model, settings, batch, index, helpers.hashes, job.begin, inputs)
                looked = () if maps is None else attention.words(maps, request.prompt, plan.weighted, index)
                png = _kept(images[index], provenance.with_size(record, images[index]), folder)
                tell(Drawn(first + index, request.seed, png, looked))
    tell(Done(tuple(dict.fromkeys(map(shelf.without_paths, notices))), round(time.monotonic() - began, 2)))


def _whole(made: Canvas, ahead: Tensor) -> Tensor:
    """What is drawn of a canvas, in it."""
    return made.finish(made.start(1.0, len(ahead)).paste(ahead))


@contextmanager
def _asking(check: Callable[[], None]) -> Iterator[None]:
    """Inside, `check` before each of torch's functions: feathering a large mask takes many, and long."""
    from torch.overrides import TorchFunctionMode

    class Asking(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            check()
            return func(*args, **(kwargs or {}))

    with Asking():
        yield


class _Pace:
    """When the next preview is due: they take no more than SHARE of the time, whatever one costs."""

    def __init__(self) -> None:
        self._next = self._began = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._next = now + max(OFTEN, (now - self._began) / SHARE)


@contextmanager
def _before_each(model: Model, checks: Sequence[Callable[[], None]]) -> Iterator[None]:
    """Inside, `checks` before each evaluation of the network, and before each layer of the autoencoder, of which one
    decoding may take longer than a step."""

    def check(*_: object) -> None:
        for each in checks:
            each()

    autoencoder = model.codec.autoencoder
    layers = [model.unet, *(() if autoencoder is None else autoencoder.modules())]
    handles = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _small(image: Tensor) -> bytes:
    content, picture = io.BytesIO(), image_io.to_pil(image)
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    picture.save(content, "JPEG", quality=80)
    return content.getvalue()


def _kept(image: Tensor, record: dict[str, object], folder: Path | None) -> bytes:
    if folder is None:
        return image_io.to_png(image, record)
    return image_io.save_numbered(image, folder, record).read_bytes()
