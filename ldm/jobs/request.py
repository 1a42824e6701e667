"""What a picture is to be: an Ask, and a Request for one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.jobs.values import shown, whole
from ldm.ranges import MAX_SEED

if TYPE_CHECKING:
    from ldm.conditioning.condition import Condition

Labels = str | int | Iterable[str | int] | None


@dataclass(frozen=True)
class Ask:
    """What a picture is to be: one row of what a network is told. A training sample is an Ask too."""

    text: str = ""
    label: str | int | None = None  # of a class-conditional model: a name, or a number where classes have no names
    size: tuple[int, int] | None = None  # height and width of the picture before it was resized, pixels
    crop: tuple[int, int] = (0, 0)  # top and left of what is seen of it, pixels after the resize
    target: tuple[int, int] | None = None  # height and width of what is seen
    score: float | None = None  # how much it pleases, of 10: for networks that are told it
    weighted: bool = False  # whether the text is read by grammar.py, or each letter as it stands
    told: Condition | None = None  # one row that is given, in the place of all that an encoder would make of this
    toward: tuple[str, float] | None = None  # another text, and how far from the one to the other it lies, in [0, 1]


@dataclass(frozen=True)
class Sizes:
    """What a network that is told sizes (SDXL) is told of the picture; None: that it is whole, and of the size drawn.

    Sizes are height and width, crop is top and left, pixels. The scores are those of the prompt and of the negative
    one, for networks that are told these (SDXL's refiner); the defaults are Stability's.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    scores: tuple[float, float] = (6.0, 2.5)


@dataclass(frozen=True)
class Request:
    """One picture: what it shows, what it should not, and the seed of its noise."""

    prompt: str
    negative: str = ""
    seed: int = 0
    label: str | int | None = None  # of a class-conditional model
    toward: tuple[str, float] | None = None  # another prompt, and the share of the way to it: between the two
    variation: tuple[int, float] | None = None  # another seed, and the share of the way to its noise
    told: Condition | None = None  # one row in the place of prompt and label, and
    told_not: Condition | None = None  # of the negative prompt
    noise: Any = field(default=None, compare=False)  # a tensor (C, h, w) of unit normals in place of the seed's first

    def asks(self, height: int, width: int, weighted: bool = False, sizes: Sizes = Sizes()) -> tuple[Ask, Ask]:
        """What the picture is to be, and what it is guided away from, at the size in pixels that is drawn."""
        whole, (score, other) = (height, width), sizes.scores
        told = sizes.original or whole, sizes.crop, sizes.target or whole
        to = Ask(self.prompt, self.label, *told, score, weighted, self.told, self.toward)
        return to, dataclasses.replace(to, text=self.negative, label=None, score=other, told=self.told_not, toward=None)

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is read of it."""
        return (self.prompt, *(self.toward or ())[:1], self.negative)  # type: ignore[return-value]

    @property
    def title(self) -> str:
        """The label and the prompt, those that there are."""
        return ", ".join([str(self.label)] * (self.label is not None) + [self.prompt] * bool(self.prompt))

    def check(self) -> Request:
        """The same; raises UserError for an invalid seed, and for texts that cannot be written to a file."""
        for seed in (self.seed, *(self.variation or ())[:1]):
            if not 0 <= seed <= MAX_SEED:
                raise UserError(f"seed {seed} is out of range; choose it between 0 and {MAX_SEED}")
        for _, share in filter(None, (self.toward, self.variation)):
            if not 0 <= share <= 1:
                raise UserError(f"a share of {share:g} was asked for; choose it from 0 (the one) to 1 (the other)")
        for text in (*self.texts, str(self.label)):
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # half of a letter, or bytes that are not UTF-8
                raise UserError(f"the prompt '{text[:100]}' is not Unicode text; write it in UTF-8")
        return self


def expand(requests: Sequence[Request], n: int) -> list[Request]:
    """`n` pictures of each request, on seeds seed, seed + 1, ...; raises UserError for a bad count, seed or text."""
    return [
        dataclasses.replace(request, seed=request.seed + i).check() for request in requests for i in range(_count(n))
    ]


def of_prompts(
    prompts: str | Iterable[str],
    negative: str | Iterable[str] = "",
    seed: int | Iterable[int] = 0,
    n: int = 1,
    label: Labels = None,
) -> list[Request]:
    """`n` pictures of each prompt, prompt by prompt; one `negative` for all, or one for each prompt.

    `label`: of a class-conditional model; one for all prompts, or one for each; one prompt serves all labels.
    `seed`: one for each picture, or a number: picture i of them all then has seed + i. Raises UserError.
    """
    texts, labels, n = _texts(prompts, "prompt"), _labels(label), _count(n)
    if len(texts) != len(labels) and 1 not in (len(texts), len(labels)):
        raise UserError(f"{len(labels)} labels were given for {len(texts)} prompts; give one for each, or one for all")
    kinds = max(len(texts), len(labels))
    texts, labels = texts * (kinds // len(texts)), labels * (kinds // len(labels))
    negatives = [negative] * kinds if isinstance(negative, str) else _texts(negative, "negative prompt")
    if len(negatives) != kinds:
        raise UserError(f"{len(negatives)} negative prompts were given for {kinds} prompts; give one for each")
    count = n * kinds
    if isinstance(seed, Iterable) and not isinstance(seed, str) and getattr(seed, "shape", None) != ():
        seeds = [whole(one, "a seed") for one in seed]
        if len(seeds) != count:
            raise UserError(f"{len(seeds)} seeds were given for {count} pictures; give one for each, or a number")
    else:
        first = whole(seed, "the seed")
        seeds = list(range(first, first + count))
    return [Request(texts[i // n], negatives[i // n], one, labels[i // n]).check() for i, one in enumerate(seeds)]


def as_label(given: Any) -> str:
    """A label as text, which may be given as a whole number; raises UserError."""
    if isinstance(given, str):
        if not given.strip():
            raise UserError("an empty label was given; name a class, or leave the label out")
        return given
    return str(whole(given, "the label"))


def batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    """`requests` in order, `size` at a time; the last batch may be smaller. Raises UserError for a size below 1."""
    if whole(size, "the batch size") < 1:
        raise UserError(f"a batch of {size} pictures was asked for; choose at least 1")
    return (requests[i : i + size] for i in range(0, len(requests), size))


def _labels(given: Labels) -> list[str | None]:
    if given is None:
        return [None]
    if isinstance(given, str) or not isinstance(given, Iterable) or getattr(given, "shape", None) == ():
        return [as_label(given)]
    labels: list[str | None] = [as_label(one) for one in given]
    if not labels:
        raise UserError("an empty list of labels was given; give at least one")
    return labels


def _count(n: Any) -> int:
    if whole(n, "n") < 1:
        raise UserError(f"{n} pictures of each prompt were asked for; choose at least 1")
    return whole(n, "n")


def _texts(given: Any, what: str) -> list[str]:
    """A text or several, as a list of one or more; raises UserError."""
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not isinstance(given, Iterable) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"the {what} is {shown(given)}; give a text, or a list of texts")
    if not texts:
        raise UserError(f"an empty list of {what}s was given; give at least one")
    return texts
