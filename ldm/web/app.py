"""The routes: the page, and /api. One request is one job, and who hangs up has cancelled it."""

from __future__ import annotations

import asyncio
import json
import traceback
from base64 import b64encode
from collections.abc import AsyncIterator, Collection
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ldm import provenance
from ldm.errors import UserError
from ldm.plain import parse_json
from ldm.web import job as jobs
from ldm.web import sent
from ldm.web.drawing import Done, Drawn, Event, Stop, draw
from ldm.web.guard import Gate, Guard, refuse
from ldm.web.job import Job
from ldm.web.limits import SETTINGS, Limits
from ldm.web.schema import form, schema
from ldm.web.shelf import Shelf
from ldm.web.turns import Ended, Full, Mailbox, Tell, Turns

PAGE = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
EVENTS = "text/event-stream"
BROKEN = "something is wrong inside the server, which is not your fault; its log says what"


def make_app(
    shelf: Shelf,
    limits: Limits = Limits(),
    gate: Gate = Gate(),
    hosts: Collection[str] = (),
    folder: Path | None = None,
) -> Starlette:
    """The application over an open `shelf`. `folder`: where pictures are written to, beside being sent."""
    api = Api(shelf, limits, Turns(limits), folder)
    routes = [
        Route("/api/schema", api.schema),
        Route("/api/draw", api.draw, methods=["POST"]),
        Route("/api/recipe", api.recipe, methods=["POST"]),
    ]
    for path in files("ldm.web").joinpath("page").iterdir():
        name = "/" if path.name == "index.html" else f"/{path.name}"
        routes.append(Route(name, _file(path.read_bytes(), PAGE[Path(path.name).suffix])))
    handlers: Any = {HTTPException: _refused, UserError: _mistaken, ClientDisconnect: _gone, Exception: _broken}
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, limits=limits, gate=gate, hosts=hosts)],
        exception_handlers=handlers,
    )
    app.state.turns = api.turns
    return app


@dataclass(frozen=True)
class Api:
    shelf: Shelf
    limits: Limits
    turns: Turns
    folder: Path | None

    async def schema(self, request: Request) -> Response:
        return JSONResponse(schema(self.shelf, self.limits))

    async def recipe(self, request: Request) -> Response:
        """A PNG's bytes -> the settings that it was made with, as `draw` takes them."""
        found = await asyncio.to_thread(provenance.read, await request.body())
        return JSONResponse(form(found, self.shelf))

    async def draw(self, request: Request) -> Response:
        """A job -> one picture as PNG; several as JSON or events, whichever the client accepts."""
        wanted = request.headers.get("accept", "")
        job = await self._job(request)
        stop, client = Stop(self.limits.most_seconds), request.client.host if request.client else ""
        if EVENTS in wanted:
            return StreamingResponse(self._events(job, stop, client), media_type=EVENTS)
        if "application/json" not in wanted and job.asked.n > 1:
            raise UserError("several pictures do not fit into one PNG; accept application/json, or ask for one")
        box = Mailbox()
        run = asyncio.create_task(self._run(job, stop, box, client))
        try:
            gone = asyncio.create_task(_hung_up(request))
            await asyncio.wait({run, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not run.done():
                raise ClientDisconnect
            await run
        finally:
            run.cancel()
        events = [event async for event in box]
        drawn = [event for event in events if isinstance(event, Drawn)]
        if "application/json" in wanted:
            done = next(event for event in events if isinstance(event, Done))
            return JSONResponse({"pictures": [_plain(event) for event in drawn]} | _plain(done))
        return Response(drawn[0].png, media_type="image/png", headers={"X-Seed": str(drawn[0].seed)})

    async def _job(self, request: Request) -> Job:
        """What a request's body asks for, checked by all that is known before its turn comes."""
        files: dict[str, bytes] = {}
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            async with request.form(max_files=1 + len(jobs.FILES), max_fields=1 + len(jobs.FILES)) as parts:
                text = parts.get("job", "{}")
                for name, part in parts.items():
                    if name not in ("job", *jobs.FILES):
                        raise UserError(f"unknown part '{name[:60]}'; there are job, {', '.join(jobs.FILES)}")
                    if isinstance(part, UploadFile):
                        files[name] = await part.read()
                    elif name != "job":
                        raise UserError(f"the part {name} is text; send a file, as curl -F {name}=@picture.png does")
            body = text.encode() if isinstance(text, str) else files.pop("job")
        else:
            body = await request.body()
        try:
            plain = parse_json(body.decode(), "the request")
        except UnicodeDecodeError:
            raise UserError("the request is not UTF-8 text; send a JSON object") from None
        for name in set(jobs.FILES) & set(plain):
            if (text := plain.pop(name)) is not None:
                files[name] = jobs.from_base64(text, name)
        if (letters := len(json.dumps(plain, ensure_ascii=False))) > SETTINGS:
            raise UserError(f"the request has {letters:,} letters of settings, which no job needs; send fewer")
        job = jobs.read(plain, files)
        self.shelf.check(job.asked, job.settings)
        model = self.shelf.opened[job.asked.model or self.shelf.first]
        self.limits.check(job.asked, job.settings.of(model.config.drawing).plan())
        _ = job.requests  # raises UserError for seeds and texts that are none
        sent.check(job, self.limits, model.config.image_size)
        return job

    async def _run(self, job: Job, stop: Stop, box: Mailbox, client: str, previews: bool = False) -> None:
        def work(stop: Stop, tell: Tell) -> None:
            draw(job, self.shelf, stop, tell, previews, self.folder)

        try:
            await self.turns.run(work, stop, box.put, client)
        except UserError as error:
            raise UserError(self.shelf.without_paths(str(error))) from error
        except Ended:
            raise HTTPException(503, "the server ends; try again when it is there") from None
        except Full as error:
            raise HTTPException(503, str(error)) from None
        finally:
            box.close()

    async def _events(self, job: Job, stop: Stop, client: str) -> AsyncIterator[str]:
        box = Mailbox()
        run = asyncio.create_task(self._run(job, stop, box, client, True))
        try:
            async for event in box:
                yield _event(type(event).__name__.lower(), _plain(event))
            try:
                await run
            except (UserError, HTTPException) as error:
                yield _event("error", {"error": getattr(error, "detail", str(error))})
            except Exception as error:
                traceback.print_exception(error)
                yield _event("error", {"error": BROKEN})
        finally:
            run.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _plain(event: Event) -> dict[str, Any]:
    def text(value: Any) -> Any:
        if isinstance(value, tuple):
            return [text(item) for item in value]
        if isinstance(value, int) and value > 2**53:  # what a browser holds of a whole number; a text is read too
            return str(value)
        return b64encode(value).decode() if isinstance(value, bytes) else value

    return {name: text(value) for name, value in asdict(event).items()}


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _file(content: bytes, kind: str) -> Any:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


# ---------------------------------------------------------------- what goes wrong


async def _refused(request: Request, error: HTTPException) -> Response:
    said = {404: f"there is nothing at {request.url.path[:60]}; the page is at /, the API at /api/draw and /api/schema"}
    said[405] = f"{request.url.path[:60]} does not take {request.method[:20]}; see /api/schema"
    return refuse(request, HTTPException(error.status_code, said.get(error.status_code, error.detail)))


async def _mistaken(request: Request, error: UserError) -> Response:
    return refuse(request, HTTPException(400, str(error)))


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody hears it


async def _broken(request: Request, error: Exception) -> Response:
    return refuse(request, HTTPException(500, BROKEN))  # the error goes on to the server's log
