"""CAPTION -> CONTEXT by T5: the encoder of T5 1.1 (Raffel et al. 2020), an adapter over transformers'.

Its states stand behind the CLIPs' along the context of Stable Diffusion 3 (Esser et al. 2024, appendix B.3). There is
no mask: the end and the padding are read like words, as the network was trained.

Shapes: B captions, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.conditioning import t5_tokenizer
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.errors import UserError
from ldm.jobs import grammar
from ldm.model_config import T5Config

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]

ITS = "the tokenizer in this model's T5"  # for error messages
LONGEST = 512  # tokens of a prompt that is read to its end: as many as T5 was trained on
Read = Callable[[nn.Module, Mapping[str, Tensor], torch.device, torch.dtype], None]


def installed() -> Any:
    """transformers; raises UserError where it is not there."""
    declare_missing_operators()  # transformers imports torchvision
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "T5 needs transformers: pip install -e '.[t5]'; or leave T5 out by --set t5=null, and zeros stand in its "
            "place"
        ) from error
    return transformers


class T5Tower(nn.Module):
    """Tokens -> context, the last block's states after the final norm.

    State-dict keys are transformers' names of the encoder, and `tokenizer`, the bytes of its tokenizer.json.
    """

    tokenizer: Tensor  # (bytes,) uint8
    here: Tensor  # (0,): on the device and of the type that it works in
    stored: Mapping[str, Tensor] | None = None  # where its numbers are, if they rest

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        theirs = installed().T5Config(
            vocab_size=config.vocabulary,
            d_model=config.width,
            d_kv=config.head_width,
            d_ff=config.hidden,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.buckets,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
        self.encoder = installed().T5EncoderModel(theirs).encoder
        for block in self.encoder.block:
            block.register_forward_pre_hook(_last_layer_in_float32)
        stored = config.tokenizer > 0
        tokenizer = torch.zeros(config.tokenizer, dtype=torch.uint8, device=None if stored else "cpu")
        self.register_buffer("tokenizer", tokenizer, persistent=stored)
        self.register_buffer("here", torch.empty(0, device="cpu"), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) long -> context (B, L, D), in float32 (float64 if the parameters are)."""
        context = self.encoder(input_ids=tokens.to(self.here.device)).last_hidden_state
        return context.to(torch.promote_types(context.dtype, torch.float32))

    @cached_property
    def pieces(self) -> Tokenizer:
        """What texts are cut with. Raises UserError for a tokenizer that is not there, or not this T5's."""
        found = t5_tokenizer.made(bytes(self.tokenizer.cpu().numpy()), ITS)
        count, rows = found.get_vocab_size(), self.config.vocabulary
        if count > rows:
            raise UserError(f"{ITS} has {count} pieces, and T5 {rows}; put T5's own there")
        return found

    def tokenize(self, texts: Sequence[str], length: int) -> tuple[Tensor, list[str]]:
        """Texts -> tokens (B, L) long on the CPU, and for each the words that did not fit ("" if all did).

        A row is at most L - 1 pieces, end, padding.
        """
        rows, dropped = [], []
        for text in texts:
            read = t5_tokenizer.cut(self.pieces, text, ITS)
            rows.append(self._row(read.ids, length))
            dropped.append(text[read.offsets[length - 1][0] :].strip() if len(read.ids) >= length else "")
        return torch.stack(rows), dropped

    def weighted(self, prompt: str, length: int) -> Tensor:
        """A prompt with weights (grammar.py) -> context (1, L, D), where L is `length`, or what the prompt needs, up to
        `LONGEST`. A token has the weight of its last letter, and a weight the meaning that it has in chunks.py.
        """
        text, weights = flat(prompt)
        read = t5_tokenizer.cut(self.pieces, text, ITS)
        long = min(max(length, len(read.ids) + 1), max(length, LONGEST))
        context = self(self._row(read.ids, long)[None])
        of = [weights[max(end - 1, 0)] for _, end in read.offsets[: long - 1]]
        if all(weight == 1 for weight in of):
            return context
        weight = torch.tensor([*of, *[1.0] * (long - len(of))]).to(context)[:, None]
        empty = self(self._row([], long)[None])
        return torch.where(weight == 1, context, empty + weight * (context - empty))

    def rest(self, state: Mapping[str, Tensor], read: Read, device: str | torch.device, dtype: torch.dtype) -> T5Tower:
        """Itself, made on the meta device, with its numbers left in `state`, a file's: each layer gets them by `read`
        (layer, state, device, type) when it is run, and gives them up behind it. The encoder is no submodule then, so
        what moves or casts the tower tells where and in what it works.
        """
        encoder = self.encoder
        del self.encoder
        self.__dict__["encoder"] = encoder.eval().requires_grad_(False)
        self.stored, self.tokenizer = state, state["tokenizer"].clone()
        layers = {f"block.{number}": block for number, block in enumerate(encoder.block)}
        for name, layer in {
            "embed_tokens": encoder.embed_tokens,
            **layers,
            "final_layer_norm": encoder.final_layer_norm,
        }.items():
            own = {key: f"encoder.{name}.{key}" for key in layer.state_dict()}

            def fetch(layer: nn.Module, _: object, own: Mapping[str, str] = own) -> None:
                read(layer, {key: state[theirs] for key, theirs in own.items()}, self.here.device, self.here.dtype)

            layer.register_forward_pre_hook(fetch, prepend=True)
            layer.register_forward_hook(lambda layer, *_: layer.to("meta") and None)
        return self.to(device, dtype).eval()

    def _row(self, pieces: Sequence[int], length: int) -> Tensor:
        """(L,) long."""
        end, pad = (self.pieces.token_to_id(piece) for piece in (t5_tokenizer.END, t5_tokenizer.PAD))
        kept = [*pieces[: length - 1], end]
        return torch.tensor(kept + [pad] * (length - len(kept)))


def flat(prompt: str) -> tuple[str, list[float]]:
    """A prompt's text without its grammar, and the weight of each letter; BREAK is a space."""
    text, weights = "", list[float]()
    for chunk in grammar.chunks(prompt):
        for i, part in enumerate(chunk):
            own = f" {part.text}" if text and not i else part.text
            text, weights = text + own, weights + [part.weight] * len(own)
    return text, weights


def _last_layer_in_float32(block: Any, _: object) -> None:
    """Before a block is run: in float16 its MLP's sums overflow, so transformers keeps their layer in float32 too."""
    out = block.layer[-1].DenseReluDense.wo
    if out.weight.dtype == torch.float16:
        out.float()
