"""Draw on a page in the browser, and over HTTP.

python scripts/web.py                                       then open http://127.0.0.1:7860
python scripts/web.py --model icons --model runs/mine --lora loras/ --out outputs
python scripts/web.py --host 0.0.0.0 --token "$(openssl rand -hex 16)" --allow-host studio.local
"""

from __future__ import annotations

from ldm.script import run

import argparse
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.arguments import Bounded, Parser, add_fields, add_machine, taken
from ldm.errors import UserError, explain_os_error
from ldm.image_io import check_folder
from ldm.web.limits import Limits
from ldm.web.shelf import Shelf, named

if TYPE_CHECKING:
    from ldm.web.guard import Gate

PORT = Bounded(int, 0, 65535)


def main() -> None:
    given = parse()
    limits = Limits(**taken(given, Limits))
    shelf = Shelf(
        named(given.model or ["icons"], "model"),
        named(given.lora or (), "LoRA"),
        named(given.embedding or (), "embedding"),
        named(given.classifier or (), "classifier"),
        given.device,
        given.precision,
    )
    try:
        import starlette  # noqa: F401
        import uvicorn

        from ldm.web.guard import Gate
    except ImportError as error:
        raise UserError(f"the page needs the extra 'web' ({error}); pip install -e '.[web]'") from error
    gate = Gate(_secret(given.token, "LDM_TOKEN"), given.user, _secret(given.password, "LDM_PASSWORD"))
    check_address(given.host, gate)
    if given.out is not None:
        check_folder(given.out)
    listening = listen(given.host, given.port)
    shelf.open_models()

    from ldm.web.app import make_app
    from ldm.web.protocol import Server, impatient

    host, port = listening.getsockname()[:2]
    names = [name.lower() for name in given.allow_host or ()]
    app = make_app(shelf, limits, gate, names, given.out)
    config = uvicorn.Config(
        app,
        http=impatient(limits),
        ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=2,
        log_level="warning",
        server_header=False,
    )
    listening.listen(limits.connections)  # who reads the next line may come at once
    print(f"http://{f'[{host}]' if ':' in host else host}:{port} draws with {', '.join(shelf.models)}", flush=True)
    Server(config, app.state.turns.end).run([listening])


def check_address(host: str, gate: Gate) -> None:
    """Raise UserError for an address that others reach, where nothing keeps them out."""
    try:
        own = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise UserError(f"--host is '{host[:60]}'; give an address in numbers, such as 127.0.0.1") from None
    if not own and not gate.closed:
        raise UserError(
            f"at {host} others than you reach this server; give --token, or --user and --password, that they need"
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound before models are opened, so that a taken port is told at once; raises UserError."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        if port and "in use" in str(error):
            raise UserError(f"port {port} of {host} is in use; choose another by --port") from error
        raise explain_os_error(error, f"taking port {port} of {host}") from error
    return listening


def _secret(given: str, variable: str) -> str:
    """What was given, or what the environment has, which other users do not see in the list of processes."""
    return given or os.environ.get(variable, "")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    about, _, examples = (__doc__ or "").partition("\n\n")
    parser = Parser(description=about, epilog=examples)
    add: Any = parser.add_argument_group("what there is to choose from").add_argument
    add("--model", action="append", metavar="MODEL", help="as txt2img.py's; may be given several times [icons]")
    add("--lora", action="append", metavar="FILE", help="a LoRA, a folder of them, or four; may be given several times")
    add("--embedding", action="append", metavar="FILE", help="a textual inversion, or a folder of them")
    add("--classifier", action="append", metavar="FOLDER", help="that tools/train_noisy_classifier.py wrote")
    add_machine(add)
    add("--out", type=Path, metavar="FOLDER", help="write all pictures there too (default: they are sent, not kept)")
    add = parser.add_argument_group("who reaches it").add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen at; another needs a token or a user")
    add("--port", type=PORT, default=7860, metavar="N", help="0: any that is free")
    add("--allow-host", action="append", metavar="NAME", help="that the server is reached by, beside its address")
    add("--token", default="", metavar="TEXT", help="that clients have to know (default: the variable LDM_TOKEN)")
    add("--user", default="", metavar="NAME", help="with --password: who may come in")
    add("--password", default="", metavar="TEXT", help="theirs (default: the variable LDM_PASSWORD)")
    add_fields(parser.add_argument_group("limits").add_argument, Limits)
    return parser.parse_args(words)


if __name__ == "__main__":
    run(main)
