"""How strongly peft's LoRAs act: their settings stand in the file's metadata (diffusers) or in adapter_config.json."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoints.reading import Tensors
from ldm.errors import UserError, first_line
from ldm.plain import parse_json, read_json
from ldm.ranges import MAX_FLOAT

MAX_PATTERN = 500  # letters of an expression; a module's name has a hundred
UNUSUAL = re.compile(r"\{|\(\?(?![:=!]|<[=!])")  # counts, whose matching may fill the memory; recursion, flags, names
MAX_SECONDS = 5.0  # of the processor, for all expressions of a file; those of a large model take a tenth

PARTS = {"unet": "unet.", "text": "text_encoder.", "text_2": "text_encoder_2."}


class Strength:
    """What a file's settings (peft's) say of the alpha and rank of its modules, where the tensors do not.

    `alpha_pattern` and `rank_pattern` are regular expressions of a stranger: matching them has a limit in time.
    """

    def __init__(self, path: Path, tensors: Tensors):
        self.path = path
        self.settings: dict[str, Any] = {}
        if "lora_adapter_metadata" in tensors.metadata:
            self.settings = parse_json(tensors.metadata["lora_adapter_metadata"], path)
        elif any(name.startswith("base_model.model.") for name in tensors):
            beside = path.parent / "adapter_config.json"
            self.settings = read_json(beside) if beside.is_file() else {}
        self._each = any(key.startswith(tuple(PARTS.values())) for key in self.settings)  # network by network
        self._compiled: dict[str, Any] = {}
        self._left = MAX_SECONDS

    def alpha(self, part: str, module: str, rank: int) -> float:
        """So that alpha / rank is the strength; `part` is "unet" or "text", `module` its name in that. The rank where
        nothing says it. Raises UserError for what is no finite number, and for expressions that are invalid or slow.
        """
        usual = self._get(part, "lora_alpha", self._get(part, "alpha", rank))  # the latter: LoHa's and LoKr's
        alpha = self._number(self._chosen(part, "alpha_pattern", module, usual), "alpha")
        return alpha * math.sqrt(rank) if self._get(part, "use_rslora", False) is True else alpha

    def rank(self, part: str, module: str) -> int | None:
        """What the settings say of it; None if nothing. Raises UserError as `alpha` does."""
        rank = self._chosen(part, "rank_pattern", module, self._get(part, "r", None))
        return None if rank is None else int(self._number(rank, "the rank"))

    def _get(self, part: str, key: str, default: Any) -> Any:
        return self.settings.get(f"{PARTS[part] if self._each else ''}{key}", default)

    def _number(self, value: Any, what: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < abs(value) < MAX_FLOAT:
            raise UserError(f"{self.path} says that {what} is {str(value)[:40]}, which is no number to scale by")
        return float(value)

    def _chosen(self, part: str, key: str, module: str, default: Any) -> Any:
        """The value of the first expression that is all of `module`'s name, or all that follows a dot in it."""
        patterns = self._get(part, key, None)
        for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
            if self._matches(pattern, module):
                return value
        return default

    def _matches(self, pattern: str, module: str) -> bool:
        import regex  # its timeout is what `re` lacks

        begin = time.process_time()
        try:
            if pattern not in self._compiled:
                if len(pattern) > MAX_PATTERN or UNUSUAL.search(pattern):
                    raise regex.error("no name of a module asks for such a one")
                self._compiled[pattern] = regex.compile(rf"(.*\.)?({pattern})$")
            if self._left <= 0:
                raise TimeoutError
            return self._compiled[pattern].match(module, timeout=self._left) is not None
        except (TimeoutError, MemoryError) as error:
            raise UserError(
                f"{self.path}: matching {pattern[:60]!r} in its alpha_pattern takes too long; the file is damaged"
            ) from error
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise UserError(
                f"{self.path}: {pattern[:60]!r} in its alpha_pattern is invalid ({first_line(error, 100)})"
            ) from error
        finally:
            self._left -= time.process_time() - begin
