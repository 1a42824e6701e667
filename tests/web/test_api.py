"""The API: the pictures are the command's, what is wrong is a sentence, and nothing leaves or enters but by names."""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import threading
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import image_io, provenance
from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.web import job as jobs
from ldm.web import sent
from ldm.web.drawing import Event, Stop, Stopped, Walked, _before_each, draw
from ldm.web.guard import HEADERS, Gate
from ldm.web.limits import Limits
from ldm.web.schema import schema
from ldm.web.shelf import Shelf, named
from web.conftest import Server, parse_event, pixels, serving, wait_for
from web.test_sent import png

EVENTS, JSON = "text/event-stream", "application/json"
SECRET = "correct horse"


# ---------------------------------------------------------------- pictures


def test_a_picture_is_that_of_the_library_and_says_how_it_was_made(server: Server, tiny_model: Any, tmp_path: Path):
    answer = server.draw(prompt="a ${cat}", seed=7, steps=3, sampler="DPM++ 2M Karras", cfg=3)
    assert (answer.status, answer.headers["content-type"], answer.headers["x-seed"]) == (200, "image/png", "7")
    drawn = tiny_model.txt2img("a ${cat}", seed=7, settings=Settings(steps=3, sampler="DPM++ 2M Karras", cfg=3))
    assert np.array_equal(pixels(answer.body), np.asarray(ldm.to_pil(drawn[0])))
    recipe = provenance.read(answer.body)
    assert (recipe.request.prompt, recipe.request.seed, recipe.settings.sampler) == ("a ${cat}", 7, "dpmpp_2m")
    assert recipe.model == "tiny" and str(tmp_path.parent).encode() not in answer.body


def test_several_pictures_come_as_json_each_with_its_seed(server: Server, tiny_model: Any):
    assert "application/json" in server.draw(n=5).error
    answer = server.draw(JSON, prompt="xyzzyx", n=5, seed=3).json
    drawn = tiny_model.txt2img("xyzzyx", seed=3, n=5, steps=2)
    assert [each["seed"] for each in answer["pictures"]] == [3, 4, 5, 6, 7]
    for each, image in zip(answer["pictures"], drawn, strict=True):
        assert np.array_equal(pixels(b64decode(each["png"])), np.asarray(ldm.to_pil(image)))
    assert any("xyzzyx" in notice for notice in answer["notices"])


def test_a_seed_that_is_not_given_is_drawn_and_told(server: Server):
    first, again = (int(server.draw().headers["x-seed"]) for _ in range(2))
    assert first != again


def test_events_tell_of_the_steps_show_previews_and_bring_the_picture(server: Server):
    names = [name for name, _ in server.draw(EVENTS, steps=6).events]
    assert set(names) >= {"walked", "drawn", "done"} and names[-2:] == ["drawn", "done"]
    events = server.draw(EVENTS, steps=40, n=2).events
    shown = [data["previews"] for name, data in events if name == "walked" and data["previews"]]
    assert shown and len(shown[0]) == 2
    preview = Image.open(io.BytesIO(b64decode(shown[0][0])))
    assert preview.format == "JPEG" and preview.size == (32, 32)


def test_a_preview_is_what_the_picture_is_going_to_be(server: Server, monkeypatch: pytest.MonkeyPatch):
    """At the last steps the prediction is nearly the picture, which the noisy state is not."""
    monkeypatch.setattr("ldm.web.drawing.OFTEN", 0.0)
    monkeypatch.setattr("ldm.web.drawing.SHARE", 1e9)
    events = server.draw(EVENTS, steps=25, seed=1).events
    final = pixels(b64decode(next(data["png"] for name, data in events if name == "drawn"))).astype(float)
    shown = [data for name, data in events if name == "walked" and data["previews"]]
    last = pixels(b64decode(shown[-1]["previews"][0])).astype(float)
    first = pixels(b64decode(shown[0]["previews"][0])).astype(float)
    assert abs(last - final).mean() < 0.8 * abs(first - final).mean()


def test_previews_are_few_where_steps_are_short(shelf: Shelf, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ldm.web.drawing.OFTEN", 1e9)
    told: list[Event] = []
    draw(jobs.read({"steps": 6}), shelf, Stop(60), told.append)
    walked = [event for event in told if isinstance(event, Walked)]
    assert len(walked) == 6 and sum(bool(event.previews) for event in walked) == 1


def test_pictures_are_written_to_a_folder_if_that_is_wanted(shelf: Shelf, tmp_path: Path):
    with serving(shelf, folder=tmp_path) as server:
        assert server.draw(seed=1).body == (tmp_path / "00000.png").read_bytes()


# ---------------------------------------------------------------- what is wrong is a sentence


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "does not hold valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "does not hold valid JSON"),
        (b'{"prompt":' * 40 + b'""' + b"}" * 40, "nests its settings"),
        (b"[]", "where a JSON object"),
        (b'{"steps": 1, "steps": 2}', "set twice"),
        ({"promt": "a cat"}, "did you mean 'prompt'"),
        ({"prompt": 5}, "prompt must be text"),
        ({"prompt": "\ud800"}, "not Unicode text"),
        ({"prompt": "a" * 20_000}, "letters"),
        ({"n": 0}, "at least 1"),
        ({"n": 17}, "limit is 16"),
        ({"n": 10**30}, "n must be"),
        ({"n": 10**15}, "limit is 16"),  # before a request is made for each
        ({"sampler": "a" * 200_000}, "letters of settings"),
        ({"sigmas": [*range(100_000, 0, -1)]}, "letters of settings"),
        ({"steps": 151}, "limit is 150"),
        ({"sigmas": [*range(200, 0, -1)]}, "limit is 150"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"width": 1028}, "limit is 1024"),
        ({"width": 30}, "multiples of 4"),
        ({"cfg": "nan"}, "cfg must be"),
        ({"cfg": "inf"}, "cfg must be"),
        ({"seed": -1}, "out of range"),
        ({"seed": 2**63 - 1, "n": 2}, "out of range"),
        ({"sampler": "eulr"}, "did you mean"),
        ({"options": {"eta": [1]}}, "options.eta must be"),
        ({"tile": 4}, "too small"),
        ({"label": "dog"}, "knows no labels"),
        ({"model": "/etc/passwd"}, "there is no model '/etc/passwd' here; there are tiny"),
        ({"model": "hf:some/thing"}, "there is no model"),
        ({"guide_model": "../tiny"}, "there is no model"),
        ({"refiner": "/etc/passwd"}, "there is no model '/etc/passwd' here; there are tiny"),
        ({"classifier": "/etc", "classifier_class": "a"}, "there is no classifier"),
        ({"loras": {"/etc/passwd": 1}}, "there is no LoRA"),
        ({"embeddings": ["http://example.org/x.pt"]}, "there is no embedding"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_a_request_that_makes_no_sense(server: Server, body: Any, said: str):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.ask("/api/draw", content)
    assert answer.status == 400 and said in answer.error, answer.body
    assert "\n" not in answer.error and len(answer.error) < 700


def test_other_places_and_methods_are_told(server: Server):
    assert server.ask("/etc/passwd").status == 404 and "/api/draw" in server.ask("/../../etc/passwd").error
    assert server.ask("/api/draw").status == 405 and "GET" in server.ask("/api/draw").error


def test_what_the_model_cannot_do_is_told_in_events_too(server: Server):
    """It is known when the job's turn comes, the answer has begun by then."""
    name, data = server.draw(EVENTS, label="dog").events[-1]
    assert name == "error" and "knows no labels" in data["error"]


def test_a_fault_of_the_servers_own_is_no_clients_and_the_server_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("ldm.provenance.record", broken)
        answer = server.draw()
        assert answer.status == 500
        assert all(answer.headers[name.lower()] == value for name, value in HEADERS.items())
        assert server.draw(EVENTS).events[-1][0] == "error"
    assert server.draw().status == 200


# ---------------------------------------------------------------- the schema and recipes


def test_the_schema_has_every_field_with_its_type_default_and_line(server: Server, shelf: Shelf):
    found = server.ask("/api/schema").json
    assert found == json.loads(json.dumps(schema(shelf, Limits())))
    for field in dataclasses.fields(Settings):
        told = found["properties"][field.name]
        assert (told["description"] and "type" in told) or "enum" in told
    steps = found["properties"]["steps"]
    assert (steps["type"], steps["default"], steps["maximum"]) == (["integer", "null"], None, 150)
    assert found["properties"]["sigmas"]["items"] == {"type": "number", "minimum": 0}
    assert found["properties"]["cfg_interval"]["maxItems"] == 2
    assert found["properties"]["sampler"]["x-options"]["heun"]["s_tmax"] == "inf"
    assert found["x-side"] == {"tiny": 32} and found["x-usual"]["tiny"]["sampler"] == "dpmpp_2m"


BESIDE: dict[str, dict[str, Any]] = {
    "rho": {"spacing": "karras"}, "eta": {"sampler": "ddim"}, "threshold_bound": {"threshold": "static"},
    "negative": {"prompt": ""},
    "width": {"height": 32}, "height": {"width": 32}, "feather": {"extend": [0, 4, 0, 0]},
    "only_masked": {"extend": [0, 4, 0, 0]},
}  # fmt: skip


def test_the_schemas_bounds_are_those_that_are_refused(shelf: Shelf):
    """A value at a bound is read, one beyond it is not; nothing that has numbers is without a bound but guidance."""
    image, limits = png(), Limits()

    def reads(name: str, value: Any) -> bool:
        files = {"image": image} if name in ("feather", "only_masked", "window", "extend", "strength") else {}
        try:
            job = jobs.read({"n": 1, "seed": 1, **BESIDE.get(name, {}), name: value}, files)
            limits.check(job.asked, job.settings.plan())
            _ = job.requests
            sent.check(job, limits, 32)
        except UserError:
            return False
        return True

    free = set()
    for name, told in schema(shelf, limits)["properties"].items():
        numbers, wrap = told, lambda value: value
        if told.get("items", {}).get("type") in ("integer", "number"):
            numbers, wrap = told["items"], {2: lambda v: [v, v], 4: lambda v: [0, v, 0, 0]}.get(
                told.get("maxItems", 0), lambda v: [9, v] if v < 9 else [v, 0]
            )  # fmt: skip
        whole = "integer" in numbers.get("type", ())
        if not whole and "number" not in numbers.get("type", ()):
            if "maxLength" in told:
                assert reads(name, "a" * told["maxLength"]) and not reads(name, "a" * (told["maxLength"] + 1)), name
            continue
        step = 1 if whole else 1e-6
        ends = {key: numbers[key] for key in ("minimum", "maximum", "exclusiveMinimum") if key in numbers}
        free |= set() if ends else {name}
        for key, end in ends.items():
            beyond = end + step if key == "maximum" else end - step * (key == "minimum")
            assert not reads(name, wrap(beyond)), (name, key)
            inside = end + step * (key == "exclusiveMinimum")
            large = name in ("enlarge", "window", "extend", "only_masked") and key == "maximum"  # other bounds, too
            assert large or reads(name, wrap(inside)), (name, key)
    assert free == {"cfg", "cfg_interval", "classifier_scale", "score", "negative_score"}


def test_the_schemas_defaults_draw(server: Server):
    properties = server.ask("/api/schema").json["properties"]
    assert server.draw(JSON, **{name: told["default"] for name, told in properties.items()}).status == 200


def test_a_pictures_recipe_asks_for_the_same_picture(server: Server):
    job = {"prompt": "a cat", "negative": "a dog", "seed": 5, "sampler": "heun", "options": {"s_churn": 3.0}, "cfg": 2}
    first = server.draw(**job)
    told = server.ask("/api/recipe", first.body).json
    assert told["notices"] == []
    assert told["settings"] | {"steps": 2} == told["settings"] and told["settings"].items() >= job.items()
    assert server.draw(**told["settings"]).body == first.body


def test_a_recipe_of_things_that_are_not_here(server: Server):
    told = json.loads(Image.open(io.BytesIO(server.draw().body)).text["ldm"])  # type: ignore[attr-defined]
    told["model"]["name"] = "/home/someone/other"
    told["adapters"] = [{"kind": "lora", "path": "/x/y.safetensors", "scale": 0.5, "hash": ""}]
    content = image_io.to_png(torch.zeros(3, 8, 8), told)
    answer = server.ask("/api/recipe", content).json
    assert answer["notices"] == ["the model other is not here", "the lora y.safetensors is not here"]
    assert "model" not in answer["settings"]


@pytest.mark.parametrize(("content", "said"), [(b"", "not a PNG"), (b"GIF89a", "not a PNG"), (b"\x89PNG\r\n", "PNG")])
def test_what_carries_no_recipe(server: Server, content: bytes, said: str):
    answer = server.ask("/api/recipe", content)
    assert answer.status == 400 and said in answer.error and "tmp" not in answer.error


def test_adapters_are_chosen_by_name(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="two of them have the name tiny"):
        named([str(tiny_checkpoint), f"{tiny_checkpoint}/"], "model")
    with pytest.raises(UserError, match="there is no LoRA"):
        named([str(tmp_path / "x")], "LoRA")
    with pytest.raises(UserError, match="has no file"):
        named([str(tmp_path)], "LoRA")
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    assert list(named([str(tmp_path)], "LoRA")) == ["a.safetensors"]
    monkeypatch.chdir(tmp_path)
    Path("four").touch()
    assert named(["four"], "LoRA") == {"four": "four"} and named(["./four"], "LoRA") == {"four": "./four"}


def test_a_job_is_read_without_a_model():
    job = jobs.read({"n": 2, "seed": 4, "sampler": "Euler a", "loras": {"x": 1}})
    assert [request.seed for request in job.requests] == [4, 5]
    assert job.settings.sampler == "euler_a" and job.asked.loras == {"x": 1.0}


# ---------------------------------------------------------------- turns


def test_jobs_wait_for_their_turns_and_are_told_their_place(server: Server):
    found: dict[int, list[tuple[str, Any]]] = {}

    def ask(i: int) -> None:
        found[i] = server.draw(EVENTS, steps=20, seed=i).events

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places = [[data["ahead"] for name, data in events if name == "place"] for events in found.values()]
    assert any(places) and all(place == sorted(place, reverse=True) for place in places)
    assert sorted(data["seed"] for events in found.values() for name, data in events if name == "drawn") == [0, 1, 2, 3]


def test_a_decoding_ends_in_its_middle(tiny_model: Any):
    """Before the next layer; afterwards all is as it was."""
    seen: list[int] = []

    def check() -> None:
        seen.append(1)
        if len(seen) == 5:
            raise Stopped

    latent = torch.zeros(1, 4, 8, 8)
    with pytest.raises(Stopped), _before_each(tiny_model, [check]):
        tiny_model.codec.decode(latent)
    assert len(seen) == 5 and tiny_model.codec.decode(latent).shape == (1, 3, 32, 32) and len(seen) == 5


def test_who_hangs_up_has_cancelled_within_a_step(server: Server, monkeypatch: pytest.MonkeyPatch):
    """Whether it is being drawn or waits; and one step may be thousands of evaluations."""
    body = json.dumps({"sampler": "langevin", "options": {"moves": 10**6}, "steps": 2}).encode()
    for accept in (EVENTS, "image/png", JSON):
        busy, waiting = server.connect(), server.connect()
        busy.request("POST", "/api/draw", body, {"Accept": accept})
        time.sleep(0.15)
        waiting.request("POST", "/api/draw", body, {"Accept": accept})
        time.sleep(0.1)
        waiting.close()
        busy.close()
        began = time.monotonic()
        assert server.draw().status == 200
        assert time.monotonic() - began < 3


def test_a_drawing_that_takes_too_long_is_ended(shelf: Shelf):
    with serving(shelf, limits=Limits(most_seconds=0.3)) as server:
        answer = server.draw(sampler="langevin", options={"moves": 10**6}, steps=2)
        assert answer.status == 400 and "longer than 0.3 seconds" in answer.error
        assert server.draw().status == 200


def test_a_full_queue_is_told(shelf: Shelf):
    with serving(shelf, limits=Limits(most_waiting=1)) as server:
        long = json.dumps({"sampler": "langevin", "options": {"moves": 10**6}, "steps": 2}).encode()
        held = [server.connect() for _ in range(2)]
        for connection in held:
            connection.request("POST", "/api/draw", long)
            time.sleep(0.1)
        answer = server.draw()
        assert answer.status == 503 and "wait already" in answer.error and answer.headers["retry-after"] == "5"
        assert server.draw(EVENTS).events[-1][0] == "error"
        for connection in held:
            connection.close()
        wait_for(lambda: server.draw().status == 200)


OTHER = "127.0.0.2"  # another address of this machine, where all of 127 is


def test_one_address_does_not_fill_the_queue(shelf: Shelf):
    with serving(shelf, limits=Limits(client_waiting=1, most_waiting=3)) as server:
        long = json.dumps({"sampler": "langevin", "options": {"moves": 10**6}, "steps": 2}).encode()
        held = [server.connect(), server.connect()]
        for connection in held:
            connection.request("POST", "/api/draw", long)
            time.sleep(0.1)
        answer = server.draw()
        assert answer.status == 503 and "1 requests of your address wait already" in answer.error
        other = server.connect(source=OTHER)
        try:
            other.request("POST", "/api/draw", b'{"steps": 1}')
        except OSError:
            pytest.skip(f"this machine has no {OTHER}")
        for connection in held:
            connection.close()
        assert other.getresponse().status == 200
        wait_for(lambda: server.draw().status == 200)


# ---------------------------------------------------------------- who may ask, and how much


def test_every_answer_carries_the_policy(server: Server):
    for path in ("/", "/nothing", "/api/schema", "/api/draw"):
        headers = server.ask(path).headers
        assert all(headers[name.lower()] == value for name, value in HEADERS.items())
    assert "unsafe" not in HEADERS["Content-Security-Policy"] and "default-src 'none'" in str(HEADERS)


@pytest.mark.parametrize("host", ["example.org", "example.org:7860", "127.0.0.1.example.org", "", "[", "a@b", "%"])
def test_a_name_that_is_not_ours_is_refused(server: Server, host: str):
    """DNS rebinding: a foreign page whose name points here."""
    answer = server.ask("/api/schema", headers={"Host": host})
    assert answer.status == 421 and "--allow-host" in answer.error


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:80", "192.168.1.5:7860"])
def test_names_that_are_ours(server: Server, host: str):
    assert server.ask("/api/schema", headers={"Host": host}).status == 200


@pytest.mark.parametrize("origin", ["https://example.org", "null", "http://127.0.0.1:1", "http://["])
def test_foreign_pages_may_not_ask(server: Server, origin: str):
    answer = server.ask("/api/draw", {"steps": 1}, {"Origin": origin})
    assert answer.status == 403
    own = server.ask("/api/draw", {"steps": 1}, {"Origin": server.url, "Host": f"127.0.0.1:{server.port}"})
    assert own.status == 200


def test_a_token_or_user_and_password(shelf: Shelf):
    from base64 import b64encode

    def basic(text: str) -> dict[str, str]:
        return {"Authorization": "Basic " + b64encode(text.encode()).decode()}

    with serving(shelf, gate=Gate(SECRET, "ann", "another secret"), hosts=["studio.local"]) as server:
        for headers in (
            {"Authorization": f"Bearer {SECRET}"}, basic(f"x:{SECRET}"), basic("ann:another secret"),
        ):  # fmt: skip
            assert server.ask("/api/schema", headers=headers | {"Host": "studio.local:7860"}).status == 200
        for headers in (
            {}, {"Authorization": "Bearer"}, {"Authorization": "Bearer x"}, {"Authorization": "Basic ="},
            basic("ann:"), basic("bob:another secret"), basic("ann:ünsinn"), {"Authorization": "Bearer \xfc"},
            basic(""), {"Authorization": "Digest " + b64encode(f"x:{SECRET}".encode()).decode()},
        ):  # fmt: skip
            answer = server.ask("/", headers=headers)
            assert answer.status == 401 and "Basic" in answer.headers["www-authenticate"], headers


@pytest.mark.parametrize("given", [("short",), ("", "ann", "short"), ("", "ann"), ("", "", "a long password")])
def test_secrets_that_are_none(given: tuple[str, ...]):
    with pytest.raises(UserError):
        Gate(*given)


def test_large_bodies_are_refused_before_they_are_read(server: Server):
    connection = server.connect()
    connection.putrequest("POST", "/api/draw")
    connection.putheader("Content-Length", str(10**8))
    connection.endheaders()
    answer = connection.getresponse()  # not a byte of the body was sent
    assert answer.status == 413 and b"24 MB" in answer.read()
    connection.close()


def test_large_bodies_of_no_said_length_are_refused(server: Server):
    def pieces():
        for _ in range(100):
            yield b" " * 10**6

    connection = server.connect()
    try:
        connection.request("POST", "/api/draw", pieces(), encode_chunked=True)
    except (BrokenPipeError, ConnectionResetError):
        return
    assert connection.getresponse().status == 413


def test_all_bodies_together_are_bounded(shelf: Shelf):
    with serving(shelf, limits=Limits(most_megabytes=2, all_megabytes=3)) as server:
        half = server.connect()
        half.putrequest("POST", "/api/draw")
        half.putheader("Content-Length", str(2 * 10**6))
        half.endheaders()
        wait_for(lambda: server.ask("/api/recipe", b" " * 1_500_000).status == 503)
        half.close()
        wait_for(lambda: server.ask("/api/recipe", b" " * 1_500_000).status == 400)


def test_who_has_said_what_it_wants_may_take_longer(shelf: Shelf):
    with serving(shelf, limits=Limits(header_seconds=0.3)) as server:
        silent, slow = server.connect(), server.connect()
        silent.connect()
        slow.putrequest("POST", "/api/draw")
        slow.putheader("Content-Length", "12")
        slow.endheaders(b'{"steps"')
        assert silent.sock is not None
        with pytest.raises((ConnectionResetError, AssertionError)):
            assert silent.sock.recv(1)
        slow.send(b": 1}")
        assert slow.getresponse().status == 200


def test_half_open_connections_shut_nobody_else_out(shelf: Shelf):
    """Of one address, and of all, only so many are taken; one too many is told so, and those before it go on."""
    with serving(shelf, limits=Limits(connections=4, client_connections=3, header_seconds=60)) as server:
        silent = [server.connect() for _ in range(3)]
        for connection in silent:
            connection.connect()
        refused(server, server.connect())
        other = server.connect(source=OTHER)
        try:
            other.request("GET", "/api/schema")
        except OSError:
            pytest.skip(f"this machine has no {OTHER}")
        answer = other.getresponse()
        assert answer.status == 200 and answer.read()
        refused(server, server.connect(source=OTHER))
        silent[0].request("GET", "/api/schema")
        assert silent[0].getresponse().status == 200
        for connection in (*silent, other):
            connection.close()
        wait_for(lambda: _asked(server))


def refused(server: Server, connection: http.client.HTTPConnection) -> None:
    connection.request("GET", "/api/schema")
    answer = connection.getresponse()
    assert answer.status == 503 and "too many connections" in json.loads(answer.read())["error"]
    assert all(answer.headers[name] == value for name, value in HEADERS.items())


def _asked(server: Server) -> bool:
    try:
        return server.ask("/api/schema").status == 200
    except OSError:
        return False


def test_what_is_no_request_is_told_with_the_policy_too(server: Server):
    for words in (b"GET /\r\n\r\n", b"\x16\x03\x01 TLS", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n"):
        connection = server.connect()
        connection.connect()
        assert connection.sock is not None
        connection.sock.sendall(words + b"\r\n\r\n")
        answer = http.client.HTTPResponse(connection.sock)
        answer.begin()
        assert answer.status == 400 and "no request in HTTP" in json.loads(answer.read())["error"]
        assert all(answer.headers[name] == value for name, value in HEADERS.items())
        connection.close()


def test_clients_that_are_too_slow_are_let_go(shelf: Shelf):
    """One that says nothing, one in the middle of its headers, of its body."""
    with serving(shelf, limits=Limits(header_seconds=0.4, slow_seconds=0.4)) as server:
        silent, headers, body = server.connect(), server.connect(), server.connect()
        silent.connect()
        headers.connect()
        assert headers.sock is not None and silent.sock is not None
        headers.sock.sendall(b"POST /api/draw HTTP/1.1\r\nHost: localhost\r\n")
        body.putrequest("POST", "/api/draw")
        body.putheader("Content-Length", "100")
        body.endheaders()
        body.send(b"{")
        assert body.getresponse().status == 408
        for connection in (silent, headers):
            assert connection.sock is not None
            with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected, AssertionError)):
                assert connection.sock.recv(1)
        assert server.draw().status == 200


def test_a_client_that_takes_nothing_holds_nobody_up(shelf: Shelf):
    with serving(shelf, limits=Limits(slow_seconds=0.5, most_side=1024)) as server:
        deaf = server.connect()
        job = {"n": 16, "steps": 1, "width": 320, "height": 320}
        deaf.request("POST", "/api/draw", json.dumps(job).encode(), {"Accept": EVENTS})
        assert server.draw().status == 200
        deaf.close()


def test_multipart_parts_are_the_job(server: Server):
    def form(more: str = "", **parts: bytes) -> Any:
        lines = [
            f'--xx\r\nContent-Disposition: form-data; name="{k}"{more}\r\n\r\n'.encode() + v + b"\r\n"
            for k, v in parts.items()
        ]
        content = b"".join(lines) + b"--xx--\r\n"
        return server.ask("/api/draw", content, {"Content-Type": "multipart/form-data; boundary=xx"})

    assert form(job=b'{"steps": 1, "seed": 1}').body == server.draw(steps=1, seed=1).body
    assert form('; filename="job.json"', job=b'{"steps": 1, "seed": 1}').body == server.draw(steps=1, seed=1).body
    assert "unknown part 'other'" in form(other=b"{}").error
    assert "curl -F image=@" in form(job=b"{}", image=b"heart.png").error  # what curl sends without the @
    assert form(job=b"{").status == 400
    assert server.ask("/api/draw", b"--yy", {"Content-Type": "multipart/form-data; boundary=xx"}).status == 400
    assert server.ask("/api/draw", b"", {"Content-Type": "multipart/form-data"}).status == 400


def test_parse_event_is_the_events_own_form():
    assert parse_event('event: done\ndata: {"a": 1}') == ("done", {"a": 1})


# ---------------------------------------------------------------- attention


def test_where_the_network_looks_at_each_word(server: Server, tiny_model: Any):
    job = {"prompt": "a (red:1.2) heart", "steps": 3, "seed": 4, "n": 2}
    shown = server.draw(JSON, **job, attention=True).json["pictures"]
    plain = server.draw(JSON, **job).json["pictures"]
    assert [each["png"] for each in shown] == [each["png"] for each in plain]  # no bit of a picture changes
    assert [word for word, _ in shown[1]["words"]] == ["a", "red", "heart"] and plain[0]["words"] == []
    with tiny_model.attention_maps(16) as maps:
        tiny_model.txt2img("a (red:1.2) heart", seed=4, n=2, settings=Settings(steps=3, prompt_syntax="weighted"))
    _, wanted = maps.words("a red heart", row=1)[2]
    found = pixels(b64decode(shown[1]["words"][2][1]))
    between = ((wanted - wanted.min()) / (wanted.max() - wanted.min())).numpy()
    assert found.shape == wanted.shape and abs(found / 255 - between).max() < 0.01
    assert server.draw(JSON, prompt="a AND b", attention=True).json["pictures"][0]["words"] == []


def test_attention_of_endless_evaluations_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ldm.web.attention.MOST_BYTES", 10**5)
    answer = server.draw(sampler="langevin", options={"moves": 10**6}, attention=True)
    assert answer.status == 400 and "leave attention out" in answer.error
