"""Checkpoint: what lies at a path, recognised, and its tensors under our names, whatever format they are kept in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from ldm.checkpoints import networks
from ldm.checkpoints.limits import check_size
from ldm.checkpoints.state import Names, Source, Together, Translated, fingerprint, some
from ldm.diffusion.schedule import check_used
from ldm.errors import UserError, printable
from ldm.model_config import AutoencoderConfig, MMDiTConfig, ModelConfig
from ldm.settings import from_dict, to_dict

if TYPE_CHECKING:
    from ldm.autoencoder.codec import Codec
    from ldm.conditioning.clip import TextTower
    from ldm.conditioning.t5 import T5Tower
    from ldm.networks import AnyNetwork

WORDS = {
    "autoencoder": "autoencoder",
    "text": "text tower",
    "text_2": "second text tower",
    "t5": "T5",
    "unet": "U-Net",
}


@dataclass(frozen=True)
class Part:
    """Where one network's tensors lie, and under which names."""

    source: Source
    names: Callable[[Iterable[str]], Names]  # our names -> theirs
    scope: tuple[str, ...]  # all names in `source` that belong to this network
    file: str  # for error messages
    groups: int = 0  # of every GroupNorm, where the format fixes or names them; 0: whatever our networks have


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as it is stored. `config` says what it is, `state` gives a network's tensors one by one."""

    path: Path
    layout: str  # "native", "original" or "diffusers", and what of it: "original single file"
    config: ModelConfig
    parts: Mapping[str, Part]  # "autoencoder", "text", "text_2", "t5", "unet" -> where it is
    assumed: tuple[str, ...] = ()  # settings ("text.padding") that rules decided, since the files do not say
    remarks: tuple[str, ...] = ()  # other sentences that a user should read
    foreign: tuple[str, ...] = ()  # tensors that are no part of the model
    facts: Mapping[str, str] = field(default_factory=dict)  # what else the files say of themselves
    two_sets: bool = False  # raw and averaged weights of the U-Net are there; `parts` has those asked for

    @overload
    def load(
        self, name: Literal["autoencoder"], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Codec: ...
    @overload
    def load(
        self, name: Literal["text", "text_2"], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> TextTower: ...
    @overload
    def load(
        self, name: Literal["t5"], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> T5Tower: ...
    @overload
    def load(
        self, name: Literal["unet"], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> AnyNetwork: ...
    def load(
        self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Codec | TextTower | T5Tower | AnyNetwork:
        """A part as a network, frozen and in evaluation mode; the autoencoder as the codec, with its shift and scale.

        Raises UserError for a part that is not there, torn, or of another architecture than its config says.
        """
        from ldm.autoencoder.codec import Codec

        config = self.config.autoencoder
        if name == "autoencoder" and config is not None and self._identity:
            return Codec(None, config)
        network: Any = networks.skeleton(name, self.config, self.part(name).file)
        networks.fill(network, self.state(name, network), device, dtype)
        return Codec(network, config) if name == "autoencoder" and config is not None else network

    def load_towers(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, rest: bool = False
    ) -> dict[str, TextTower | T5Tower]:
        """The text towers by name, T5 behind them; none of a model that takes no captions. `rest`: T5's numbers stay in
        the file and are read layer by layer while it runs. Raises UserError as `load`, and for a T5 without tokenizer.
        """
        names: tuple[Any, ...] = (*self.config.towers,) or ("text",)  # of which `load` says that it is not there
        towers = {name: self.load(name, device, dtype) for name in names} if self.config.takes_text else {}
        if self.config.t5 is None or not towers:
            return towers
        if not self.config.t5.tokenizer:
            raise UserError(
                f"the T5 in {self.part('t5').file} has no tokenizer, and files of weights bring none: put "
                "tokenizer.json or spiece.model of google/t5-v1_1-xxl, or of a tokenizer_3 of Stable Diffusion 3, into "
                "a folder tokenizer_3 beside the model; or leave T5 out by --set t5=null, and zeros stand in its place"
            )
        if not rest:
            return towers | {"t5": self.load("t5", device, dtype)}
        tower: Any = networks.skeleton("t5", self.config, self.part("t5").file)
        return towers | {"t5": tower.rest(self.state("t5", tower), networks.fill, device, dtype)}

    def state(self, name: str, network: nn.Module | None = None) -> Translated:
        """The tensors of a part ("autoencoder", "text", "unet" ...) as they are stored, each read when it is asked for.

        `network` is the part's own, on the meta device or not, if the caller has built it. Raises UserError for a part
        that is not there, and one that lists the names of all tensors that are missing, unexpected or misshapen.
        """
        part = self.part(name)
        if network is None:
            network = networks.skeleton(name, self.config, part.file)
        own = network.state_dict()
        shapes = {key: tuple(value.shape) for key, value in own.items()}
        data = [key for key, value in own.items() if not value.is_floating_point()]
        what = f"the {WORDS[name]} in {part.file}"
        state = Translated(part.source, part.names(shapes), shapes, what, part.scope, data)
        found = networks.norm_groups(network)
        if part.groups and found - {part.groups}:
            raise UserError(
                f"the {WORDS[name]} in {part.file} normalises in {part.groups} groups, and ours of these widths in "
                f"{' or '.join(map(str, sorted(found)))}; it cannot be read"
            )
        return state

    def part(self, name: str) -> Part:
        """Where a part is; raises UserError if it is not there."""
        if name not in self.parts or getattr(self.config, name) is None:
            present = [WORDS[part] for part in self.parts if getattr(self.config, part) is not None]
            only = f"only its {' and '.join(present)}" if present else "nor any other network"
            sd3 = name.startswith("text") and isinstance(self.config.unet, MMDiTConfig) and self.path.is_file()
            how = "put clip_l.safetensors and clip_g.safetensors beside it" if sd3 else "name a checkpoint that has one"
            raise UserError(f"{self.path} has no {WORDS[name]}, {only}; {how}")
        return self.parts[name]

    def only(self, *names: str) -> Checkpoint:
        """The same with some parts in sight, and what a user should read of these. UserError if one is not there."""
        for name in names:
            if not (name == "autoencoder" and self._identity):
                self.part(name)
        words = [WORDS[name] for name in names]
        settings = {**{name: getattr(self.config, name) for name in names}, "image_size": self.config.image_size}
        return replace(
            self,
            config=ModelConfig(**settings),
            parts={key: part for key, part in self.parts.items() if key in names},
            assumed=tuple(key for key in self.assumed if key.partition(".")[0] in names and "." in key),
            remarks=tuple(
                remark for remark in self.remarks if any(w in remark for w in words) or not _names_part(remark)
            ),
            foreign=(),
            two_sets=self.two_sets and "unet" in names,
        )

    @property
    def _identity(self) -> bool:
        """Whether its codec is the one that changes nothing and has no weights."""
        return self.config.autoencoder is not None and self.config.autoencoder.kind == "identity"

    def tensors(self) -> Mapping[str, Tensor]:
        """All parts as they are stored, each key with its part's name in front ("unet.conv_in.weight")."""
        return Together({name: self.state(name) for name in self.parts})

    @cached_property
    def base_hash(self) -> str:
        """sha256, in hex, of what an adapter is made for: U-Net and text towers as they are stored, whatever container
        and autoencoder they have."""
        return fingerprint(Together({name: self.state(name) for name in (*self.config.towers, "unet")}))

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should read before trusting the pictures."""
        found = list(self.remarks)
        if self.assumed:
            words = ", ".join(f"{key}={_value(self.config, key)}" for key in self.assumed)
            told = f"{self.path} does not say all that it is; assumed by its kind: {words}"
            found.insert(0, f"{told} (--set changes it, init_set of a training)")
        if self.foreign:
            found.append(f"{len(self.foreign)} tensors in {self.path} are passed over: {some(self.foreign)}")
        if self.config.t5 is None and self.config.encoder.t5_tokens and self.config.unet is not None:
            found.append(f"{self.path} draws without T5: zeros stand in its place")
        return tuple(map(printable, found))

    def with_settings(self, settings: Mapping[str, Any]) -> Checkpoint:
        """The same with some settings of its config replaced: {"parameterization": "v", "text.padding": "eot"}; and
        without the parts that they are None of, as {"t5": None}.

        Raises UserError for one that does not exist or is not read, or a value of the wrong type.
        """
        plain = to_dict(self.config)
        for key, value in settings.items():
            place, *rest = key.split(".")
            inner = plain
            while rest:
                if not isinstance(inner.get(place), dict):
                    raise UserError(f"--set {key}: {self.path} has no {place}")
                inner, (place, *rest) = inner[place], rest
            inner[place] = list(value) if isinstance(value, tuple) else value
        config = check_size(from_dict(ModelConfig, plain, "--set"), "--set")  # a picture's recipe has some too
        if config.schedule is not None:  # of what was set; what the model had of another kind may stand there
            check_used(config.schedule, {key.removeprefix("schedule.") for key in settings})
        assumed = tuple(key for key in self.assumed if key not in settings)
        left = {name: part for name, part in self.parts.items() if name not in settings or settings[name] is not None}
        return replace(self, config=config, parts=left, assumed=assumed)

    def with_second_tower(self, other: Checkpoint, both: bool = False) -> Checkpoint:
        """The same with the text tower of `other` beside its own, both read as Stable Diffusion XL reads its two: the
        last block but one without the final norm, and the second's projection alone; of `both`, as Stable Diffusion 3.
        Raises UserError if there are two already, or `other` has none.
        """
        if self.config.text_2 is not None:
            raise UserError(f"{self.path} has two text towers already; name no other beside them")
        own, its = self.part("text"), other.part("text")
        first, second = self.config.text, other.config.text
        assert first is not None and second is not None  # or there were no such parts
        scope = tuple(name for name in own.scope if both or not name.endswith("text_projection"))
        width = first.embed_dim if both else 0
        read: dict[str, Any] = {"layer": "penultimate", "final_norm": False}
        assumed = (key.replace("text.", "text_2.", 1) for key in other.assumed if key.startswith("text."))
        return replace(
            self,
            config=replace(self.config, text=replace(first, embed_dim=width, **read), text_2=replace(second, **read)),
            parts={**self.parts, "text": replace(own, scope=scope), "text_2": its},
            assumed=(*self.assumed, *assumed),
            remarks=self.remarks + other.only("text").remarks,
        )

    def with_autoencoder(self, other: Checkpoint) -> Checkpoint:
        """The same over another's autoencoder. One that does not say its shift and scale gets this one's.

        Raises UserError if `other` has none, or one with other latents.
        """
        part, ours, theirs = other.part("autoencoder"), self.config.autoencoder, other.config.autoencoder
        assert theirs is not None  # or there were no such part
        if ours is not None and (ours.channels_of_latent, ours.factor) != (theirs.channels_of_latent, theirs.factor):
            raise UserError(
                f"the autoencoder in {other.path} makes latents of {_latent(theirs)}, the model takes {_latent(ours)}"
            )
        if ours is not None and "autoencoder.scale" in other.assumed:
            theirs = replace(theirs, shift=ours.shift, scale=ours.scale)
        return replace(
            self,
            config=replace(self.config, autoencoder=theirs),
            parts={**self.parts, "autoencoder": part},
            assumed=tuple(key for key in self.assumed if not key.startswith("autoencoder.")),
            remarks=self.remarks + other.remarks,
        )


def _names_part(remark: str) -> bool:
    return any(word in remark for word in WORDS.values())


def _value(config: ModelConfig, key: str) -> str:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return json.dumps(found).strip('"')


def _latent(config: AutoencoderConfig) -> str:
    return f"{config.channels_of_latent} channels at 1/{config.factor}"
