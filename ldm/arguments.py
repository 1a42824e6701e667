"""The command line's parser, for all scripts and tools."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ldm.errors import UserError


class Parser(argparse.ArgumentParser):
    """Mistakes end in one sentence, as everywhere; its subcommands' too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")
