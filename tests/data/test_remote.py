"""Shards from a web server that misbehaves, from a store, from a command; the cache; what stays bad."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import pytest

from ldm.config import DataConfig
from ldm.data import cache, fetch
from ldm.data.cache import Store
from ldm.data.index import dump, index_shard, parse
from ldm.data.loader import Loader
from ldm.data.sources import expand_sources
from ldm.errors import UserError

from .shard_maker import bare, picture, sample, write_tar


@dataclass
class Server:
    """Serves the files of a folder; `faults` of a name are taken one for each request, then it behaves."""

    folder: Path
    port: int = 0
    faults: dict[str, list[str]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    """Faults: drop N (the connection after N bytes), short N (N bytes less, and nothing said), a status, html, slow."""
    served = Server(tmp_path / "served")
    served.folder.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.lstrip("/").split("?")[0]
            if not name.endswith(".index") or (served.folder / name).exists():
                served.asked[name] += 1
            fault = served.faults[name].pop(0).split() if served.faults.get(name) else ["none"]
            path = served.folder / name
            content = path.read_bytes() if path.exists() else b""
            if fault[0].isdigit() or not path.exists():
                self.send_error(int(fault[0]) if fault[0].isdigit() else 404)
                return
            if fault[0] == "html":
                content = b"<html>please log in</html>" * 100
            begin, tag = 0, f'"{len(content)}"'
            if "Range" in self.headers and self.headers.get("If-Range") == tag and "norange" not in fault:
                begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - begin))
            self.send_header("ETag", tag)
            self.end_headers()
            body = content[begin:]
            if fault[0] in ("drop", "short"):
                body = body[: int(fault[1])] if fault[0] == "drop" else body[: len(body) - int(fault[1])]
                self.close_connection = True
            served.sent[name] += len(body)
            self.wfile.write(body)

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.port = running.server_port
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.001)


def fill(folder: Path, shards: int = 3, each: int = 8) -> None:
    for shard in range(shards):
        members = [member for i in range(each) for member in sample(f"s{shard}-{i}", 100 * shard + i)]
        write_tar(folder / f"{shard}.tar", members)


def settings(tmp_path: Path, shards: str, **changes) -> DataConfig:
    config = DataConfig(shards=shards, size=8, streams=2, workers=0, shuffle=4, cache=str(tmp_path / "cache"))
    return replace(config, **changes)


def keys(loader: Loader, batches: int) -> list[str]:
    return [bare(key) for batch in islice(loader, batches) for key in batch.key]


FAULTS = [
    {},
    {"0.tar": ["drop 5000", "drop 700", "drop 0"], "2.tar": ["503", "429"]},
    {"1.tar": ["short 1", "short 9999"], "0.tar": ["drop 5000", "norange"]},
]


@pytest.mark.parametrize("faults", FAULTS)
def test_a_web_server_that_stumbles_gives_the_run_that_files_give(tmp_path, server, faults):
    fill(server.folder)
    local = keys(Loader(settings(tmp_path, f"{server.folder}/*.tar"), 4), 12)
    server.faults = {name: list(each) for name, each in faults.items()}
    remote = settings(tmp_path, server.url("{0..2}.tar?token=x"))
    assert keys(Loader(remote, 4), 12) == local
    asked = {f"{i}.tar": 1 + len([f for f in faults.get(f"{i}.tar", []) if f != "norange"]) for i in range(3)}
    assert server.asked == asked
    assert keys(Loader(replace(remote, workers=2), 4), 12) == local  # from the cache, in processes of their own
    assert server.asked == asked


def test_a_transfer_goes_on_where_it_broke_off(tmp_path, server):
    fill(server.folder, 1)
    size = (server.folder / "0.tar").stat().st_size
    server.faults = {"0.tar": ["drop 5000", "drop 3000"]}
    with Store.of(settings(tmp_path, "")).open(server.url("0.tar")) as copy:
        assert copy.read() == (server.folder / "0.tar").read_bytes()
    assert server.sent["0.tar"] == size


def test_many_drops_that_each_bring_something_are_no_failure(tmp_path, server):
    fill(server.folder, 1)
    server.faults = {"0.tar": ["drop 900"] * 3 * fetch.ATTEMPTS}
    with Store.of(settings(tmp_path, "")).open(server.url("0.tar")) as copy:
        assert copy.read() == (server.folder / "0.tar").read_bytes()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (["404"], "the server answers 404"),
        (["403"], "the server answers 403"),
        (["drop 0"] * 99, "8 times in a row"),
        (["html"] * 99, "it does not begin with a tar header"),
    ],
)
def test_a_shard_that_stays_bad_is_in_quarantine_by_name_and_the_run_goes_on(tmp_path, server, caplog, fault, reason):
    fill(server.folder)
    server.faults = {"1.tar": list(fault)}
    config = settings(tmp_path, server.url("{0..2}.tar"), bad_limit=0.4)
    loader = Loader(config, 4)
    assert {key[:2] for key in keys(loader, 8)} == {"s0", "s2"}
    (lost,) = loader.data.quarantine.values()
    name = lost.source
    assert name == server.url("1.tar") and reason in lost.why
    assert "1 shards in quarantine" in loader.describe() and f"shard in quarantine: {name}" in caplog.text
    server.faults = {"1.tar": list(fault)}
    with pytest.raises(UserError, match=r"1 of the 3 shards of data.shards cannot be used.*1\.tar: "):
        Loader(replace(config, bad_limit=0.2), 4)


QUARANTINE = [{}, {"where": {"kind": ["a", "b"]}}, {"size": 16, "buckets": 8}, {"mixture": True}]


@pytest.mark.parametrize("changes", QUARANTINE)
def test_what_was_in_quarantine_at_the_start_stays_out_when_it_is_back(tmp_path, server, changes):
    for shard in range(4):
        sizes = [(24, 24), (24, 48)]
        members = []
        for i in range(8):
            meta = json.dumps({"kind": "abc"[i % 3]}).encode()
            members += [(f"{i}.png", picture(9 * shard + i, sizes[i % 2])), (f"{i}.txt", b"x"), (f"{i}.json", meta)]
        write_tar(server.folder / f"{shard}.tar", members)
    config = settings(tmp_path, server.url("{0..3}.tar"), bad_limit=0.5, **{**changes, "mixture": {}})
    if "mixture" in changes:
        config = replace(config, shards="", mixture={server.url("{0..1}.tar"): 1, server.url("{2..3}.tar"): 3})
    server.faults = {"1.tar": ["404"]}
    first = Loader(config, 4)
    batches = iter(first)
    begun = [key for batch in islice(batches, 3) for key in batch.key]
    state = json.loads(json.dumps(first.state_dict()))
    whole = begun + [key for batch in islice(batches, 9) for key in batch.key]
    assert state["quarantine"] == ["1"] and not any(key.startswith("1/") for key in whole)

    back = Loader(config, 4)
    assert not back.data.quarantine
    back.load_state_dict(state)
    assert back.state_dict() == state and back.quarantined == {server.url("1.tar")}
    assert "1 shards in quarantine" in back.describe() and back.samples_per_epoch == first.samples_per_epoch
    assert begun + [key for batch in islice(back, 9) for key in batch.key] == whole

    clear(tmp_path)  # another machine, which cannot have another shard
    server.faults = {"2.tar": ["404"], "1.tar": ["404"]}
    with pytest.raises(UserError, match=r"http.*/2.tar, which is not available now \(the server answers 404"):
        Loader(config, 4).load_state_dict(state)
    server.faults = {"1.tar": ["404"]}
    third = Loader(config, 4)
    third.load_state_dict(state)
    assert begun + [key for batch in islice(third, 9) for key in batch.key] == whole


@pytest.mark.parametrize("changes", QUARANTINE[1:3])
def test_a_shard_that_goes_while_it_is_looked_into_is_in_quarantine(tmp_path, server, changes):
    fill(server.folder)
    config = settings(tmp_path, server.url("{0..2}.tar"), bad_limit=0.4, **{**changes, "where": {}})
    Loader(replace(config, buckets=0), 4)  # the indices are known now
    for path in copies(tmp_path):
        path.unlink()
    server.faults = {"1.tar": ["404"] * 3}
    loader = Loader(replace(config, where={"kind": ["null"]} if "where" in changes else {}), 4)
    assert list(loader.data.quarantine) == ["1"] and loader.samples_per_epoch == 16
    for path in [*copies(tmp_path), *(tmp_path / "cache").glob(".shapes-*")]:
        path.unlink()
    server.faults = {"1.tar": ["404"] * 3, "2.tar": ["404"] * 3}
    with pytest.raises(UserError, match=r"2 of the 3 shards of data.shards cannot be used"):
        Loader(replace(config, where={"kind": ["null"]} if "where" in changes else {}), 4)


def test_the_shapes_of_remote_pictures_are_read_once(tmp_path, server):
    fill(server.folder)
    config = settings(tmp_path, server.url("{0..2}.tar"), size=16, buckets=8)
    first = keys(Loader(config, 4), 6)
    for path in copies(tmp_path):
        path.unlink()
    server.asked.clear()
    again = Loader(config, 4)
    assert not server.asked and keys(again, 6) == first
    one = next((tmp_path / "cache").glob(".shapes-*-0.tar"))
    one.write_bytes(one.read_bytes()[:-1])
    assert keys(Loader(config, 4), 6) == first


def clear(tmp_path: Path) -> None:
    for path in (tmp_path / "cache").iterdir():
        path.unlink()


def test_a_shard_that_goes_later_is_stood_in_for_and_comes_back(tmp_path, server, caplog, monkeypatch):
    fill(server.folder)
    config = settings(tmp_path, server.url("{0..2}.tar"), bad_limit=1)
    whole = keys(Loader(config, 4), 18)
    loader = Loader(config, 4)
    for path in (tmp_path / "cache").glob("*-1.tar"):
        path.unlink()
    server.faults = {"1.tar": ["404"]}
    clock = [0.0]
    monkeypatch.setattr("ldm.data.reader.time.monotonic", lambda: clock[0])
    batches = iter(loader)
    first = [bare(key) for batch in islice(batches, 6) for key in batch.key]
    assert all(got == key or (key[:2] == "s1" and got[:2] != "s1") for got, key in zip(first, whole, strict=False))
    assert server.asked["1.tar"] == 2  # once to index it; in quarantine, it is not asked for again
    assert loader.tally.counts["its shard is in quarantine"] >= 8 and loader.quarantined == {server.url("1.tar")}
    clock[0] = 1e6
    assert [bare(key) for batch in islice(batches, 12) for key in batch.key] == whole[24:]


def test_too_many_bad_samples_stop_the_run_with_the_reasons(tmp_path):
    members = [member for i in range(300) for member in sample(f"k{i}", i)]
    for i in range(0, 300, 4):
        members[3 * i] = (f"k{i}.png", b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    write_tar(tmp_path / "x.tar", members)
    config = settings(tmp_path, str(tmp_path / "x.tar"))
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"data.bad_limit=0.1 \(the picture does not decode: 3\d\)"):
            keys(Loader(replace(config, workers=workers), 4), 100)
    assert len(keys(Loader(replace(config, bad_limit=0.3), 4), 80)) == 320
    members[1::3] = [(name, b"") for name, _ in members[1::3]]
    for i in range(0, 300, 3):
        members[3 * i + 2] = (f"k{i}.jsn", b"")
    write_tar(tmp_path / "y.tar", members)
    with pytest.raises(UserError, match=r"100 of 300 samples cannot be used.*\(no caption: 100\)"):
        Loader(replace(config, shards=str(tmp_path / "y.tar")), 4)


# ---------------------------------------------------------------- stores and commands


def test_any_store_of_fsspec_is_read_and_listed(tmp_path):
    import fsspec

    fill(tmp_path)
    memory = fsspec.filesystem("memory")
    for i in range(3):
        memory.pipe(f"/bucket/{i}.tar", (tmp_path / f"{i}.tar").read_bytes())
    local = keys(Loader(settings(tmp_path, f"{tmp_path}/*.tar"), 4), 6)
    assert keys(Loader(settings(tmp_path, "memory://bucket/*.tar"), 4), 6) == local
    assert expand_sources("memory://bucket/{2,0}.tar") == ["memory://bucket/2.tar", "memory://bucket/0.tar"]
    with pytest.raises(UserError, match=r"no file matches 'memory://bucket/x"):
        expand_sources("memory://bucket/x*.tar")
    with pytest.raises(UserError, match=r"no store that fsspec knows"):
        expand_sources("nosuch://bucket/x*.tar")
    with pytest.raises(UserError, match=r"1 of the 1 shards .* FileNotFoundError"):
        Loader(settings(tmp_path, "memory://bucket/9.tar"), 4)


@pytest.mark.slow
def test_s3(tmp_path, monkeypatch):
    server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    fill(tmp_path)
    running = server.ThreadedMotoServer(port=0)
    running.start()
    try:
        url = "http://{}:{}".format(*running.get_host_and_port())
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
            "FSSPEC_S3_ENDPOINT_URL": url,
        }.items():
            monkeypatch.setenv(name, value)
        from fsspec.config import conf, set_conf_env

        set_conf_env(conf)
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket="shards")
        for i in range(3):
            client.upload_file(str(tmp_path / f"{i}.tar"), "shards", f"set/{i}.tar")
        local = keys(Loader(settings(tmp_path, f"{tmp_path}/*.tar"), 4), 6)
        assert keys(Loader(settings(tmp_path, "s3://shards/set/*.tar"), 4), 6) == local
        again = settings(tmp_path, "s3://shards/set/{0..2}.tar", workers=2, cache=str(tmp_path / "other"))
        assert keys(Loader(again, 4), 6) == local
    finally:
        running.stop()


def test_a_command_is_run_only_if_it_was_allowed(tmp_path):
    fill(tmp_path)
    command = f"pipe:cat {tmp_path}/{{0..2}}.tar"
    with pytest.raises(UserError, match=r"holds the command 'pipe:cat .*say data.allow_pipe=true"):
        Loader(settings(tmp_path, command), 4)
    local = keys(Loader(settings(tmp_path, f"{tmp_path}/*.tar"), 4), 6)
    assert keys(Loader(settings(tmp_path, f"  {command}\n", allow_pipe=True), 4), 6) == local


def test_a_command_that_fails_or_is_torn_is_no_shard(tmp_path):
    fill(tmp_path, 1)
    words = f"pipe:head -c 3000 {tmp_path}/0.tar; exit 3"
    with pytest.raises(UserError, match=r"the command ended with exit code 3, 8 times in a row"):
        Loader(settings(tmp_path, words, allow_pipe=True), 4)
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".lock")]


def test_a_pipe_whose_first_part_fails_is_no_shard_and_a_short_one_is_asked_for_again(tmp_path):
    fill(tmp_path, 1)
    shard, whole = tmp_path / "0.tar", (tmp_path / "0.tar").read_bytes()
    store = Store(tmp_path / "cache", 10**9, allow_pipe=True)
    words = f"pipe:(head -c 9000 {shard}; exit 3) | cat"
    with pytest.raises(fetch.Unreachable, match=r"exit code 3, 8 times in a row"):
        store.open(words)
    once = f"pipe:if test -e {tmp_path}/again; then cat {shard}; else touch {tmp_path}/again; head -c 9000 {shard}; fi"
    with store.open(once) as copy:
        assert copy.read() == whole
    with store.open(f"pipe:head -c 9000 {shard}") as copy:  # always: so it is torn, and used as files are
        assert copy.read() == whole[:9000]


def test_a_set_with_indices_is_opened_without_its_shards(tmp_path, server):
    fill(server.folder)
    for i in range(3):
        shard = server.folder / f"{i}.tar"
        (server.folder / f"{i}.tar.index").write_bytes(dump(index_shard(shard)))
    local = keys(Loader(settings(tmp_path, f"{server.folder}/*.tar"), 4), 12)
    loader = Loader(settings(tmp_path, server.url("{0..2}.tar?token=x")), 4)
    assert server.asked == {f"{i}.tar.index": 1 for i in range(3)}
    assert keys(loader, 12) == local
    Loader(settings(tmp_path, server.url("{0..2}.tar?token=x")), 4)
    assert server.asked == {f"{i}.tar{end}": 1 for i in range(3) for end in ("", ".index")}


def test_a_shard_that_is_not_what_its_index_says_is_in_quarantine(tmp_path, server, caplog):
    fill(server.folder)
    config = settings(tmp_path, server.url("{0..2}.tar"), bad_limit=1)
    Loader(config, 4)
    for path in copies(tmp_path):
        path.unlink()
    write_tar(server.folder / "1.tar", sample("other"))
    loader = Loader(config, 4)
    assert {key[:2] for key in keys(loader, 6)} == {"s0", "s2"}
    assert loader.quarantined == {server.url("1.tar")} and "it is not what its index says" in caplog.text
    assert "othe" in {key[:4] for key in keys(Loader(config, 4), 6)}  # a new run indexes it anew


@pytest.mark.parametrize("change", [b"{", b"[]", b'{"format": "x"}', "size", "offset", "endless", "huge"])
def test_an_index_that_cannot_be_is_none(tmp_path, change):
    index = index_shard(write_tar(tmp_path / "x.tar", sample("a")))
    content = dump(index)
    found = parse(content, "x")
    assert found is not None and (found.keys, found.members) == (index.keys, index.members)
    if change == "size":
        change = content.replace(b'"size": 10240', b'"size": 1024')
    elif change == "offset":
        change = content.replace(b"[512,", b"[-512,")
    elif change == "endless":
        change = content.replace(b'"size": 10240', b'"size": 1e999')
    elif change == "huge":
        change = content.replace(b'"size": 10240', b'"size": 1' + b"0" * 40).replace(b"[512,", b"[1" + b"0" * 39 + b",")
    assert change != content and parse(change, "x") is None


# ---------------------------------------------------------------- the cache


def copies(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]


def test_the_cache_stays_below_its_size_and_the_run_is_the_same(tmp_path, server):
    fill(server.folder, 6)
    size = (server.folder / "0.tar").stat().st_size
    local = keys(Loader(settings(tmp_path, f"{server.folder}/*.tar"), 4), 24)
    store = Store(tmp_path / "cache", int(2.5 * size))
    for i in (0, 1, 2, 1, 3):
        store.open(server.url(f"{i}.tar")).close()
        assert sum(path.stat().st_size for path in copies(tmp_path)) <= store.limit
    assert {path.name[-5] for path in copies(tmp_path)} == {"1", "3"}  # the longest unused went first
    config = settings(tmp_path, server.url("{0..5}.tar"), cache_gb=2.5 * size / 1e9)
    assert keys(Loader(config, 4), 24) == local
    assert sum(path.stat().st_size for path in copies(tmp_path)) <= store.limit


def test_what_is_being_read_goes_last_and_stays_readable(tmp_path, server, caplog):
    fill(server.folder, 3)
    size = (server.folder / "0.tar").stat().st_size
    cache._warned.clear()
    store = Store(tmp_path / "cache", int(1.5 * size))
    with store.open(server.url("0.tar")) as first, store.open(server.url("1.tar")) as second:
        assert "smaller than what is read from it at once" in caplog.text
        assert first.read() == (server.folder / "0.tar").read_bytes()
        assert second.read() == (server.folder / "1.tar").read_bytes()
    assert len(copies(tmp_path)) == 1


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_ends_no_transfer_and_the_dead_are_known(tmp_path, server, monkeypatch, jump):
    """Another process looks for room while a copy is under way, and its clock is days off."""
    fill(server.folder, 5)
    own = cache.lock_of(server.url("0.tar"))  # one thread waits for the other here, so they must not share a lock
    beside = next(name for name in ("1.tar", "2.tar", "3.tar", "4.tar") if cache.lock_of(server.url(name)) != own)
    store, write, seen = Store(tmp_path / "cache", 10**9), fetch._write, []
    store.folder.mkdir()
    dead = store.folder / ".dead.part"

    def other() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("time.time", lambda: 1.8e9 + jump)
            patch.setattr("time.time_ns", lambda: int((1.8e9 + jump) * 1e9))
            store.open(server.url(beside)).close()

    def slow(target: Path, chunk: bytes, offset: int) -> None:
        write(target, chunk, offset)
        if "0.tar" in target.name:
            dead.write_bytes(b"half")
            os.utime(target, (0, 0))
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            seen.append((target.exists(), dead.exists()))

    monkeypatch.setattr(fetch, "_write", slow)
    with store.open(server.url("0.tar")) as copy:
        assert copy.read() == (server.folder / "0.tar").read_bytes()
    assert seen == [(True, False)] and {path.name[-5:] for path in copies(tmp_path)} == {"0.tar", beside}
    assert not list(store.folder.glob(".*.part"))


def test_a_copy_is_on_the_disk_before_it_has_its_name(tmp_path, server, monkeypatch):
    fill(server.folder, 1)
    done, sync, replace_ = [], os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda file: (done.append(("fsync", os.fstat(file).st_ino)), sync(file)))
    monkeypatch.setattr("os.replace", lambda a, b: (done.append(("named", os.stat(a).st_ino)), replace_(a, b)))
    store = Store(tmp_path / "cache", 10**9)
    with store.open(server.url("0.tar")) as copy:
        inode = os.fstat(copy.fileno()).st_ino
    assert done == [("fsync", inode), ("named", inode)]


def test_transfers_at_a_time_see_what_each_other_will_take(tmp_path, server, monkeypatch):
    """Room is kept before the first byte is written, whether the source says its size or not."""
    fill(server.folder, 4)
    size = (server.folder / "0.tar").stat().st_size
    store, write, most = Store(tmp_path / "cache", int(3.2 * size)), fetch._write, []
    monkeypatch.setattr(fetch, "CHUNK", 4096)

    def watched(target: Path, chunk: bytes, offset: int) -> None:
        write(target, chunk, offset)
        most.append(sum(path.stat().st_size for path in store.folder.iterdir() if path.exists()))

    monkeypatch.setattr(fetch, "_write", watched)
    piped = replace(store, allow_pipe=True)
    sources = [server.url("0.tar"), server.url("1.tar"), *(f"pipe:cat {server.folder}/{i}.tar" for i in (2, 3))]
    for _ in range(2):
        threads = [threading.Thread(target=lambda each: piped.open(each).close(), args=(each,)) for each in sources[:3]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        piped.open(sources[3]).close()
    assert max(most) <= store.limit
    with piped.open(sources[3]) as copy:  # reserved by steps, and cut to what it was
        assert copy.read() == (server.folder / "3.tar").read_bytes()


def test_a_shard_larger_than_the_cache_is_named(tmp_path, server):
    fill(server.folder, 1)
    with pytest.raises(UserError, match=r"are more than the cache of 1e-06 GB; raise data.cache_gb"):
        Loader(settings(tmp_path, server.url("0.tar"), cache_gb=1e-6), 4)
    with pytest.raises(UserError, match=r"data.cache_gb is 0"):
        Loader(settings(tmp_path, server.url("0.tar"), cache_gb=0), 4)


@pytest.mark.parametrize("inside", ["", "x"])
def test_a_cache_that_is_a_file_is_named(tmp_path, server, inside):
    fill(server.folder, 1)
    (tmp_path / "file").write_text("")
    config = settings(tmp_path, server.url("0.tar"), cache=str(tmp_path / "file" / inside))
    with pytest.raises(UserError, match=r"a file where a folder is needed .* while copying a shard into \S+/file"):
        Loader(config, 4)


def test_of_many_readers_one_transfers(tmp_path, server):
    fill(server.folder, 1)
    store = Store(tmp_path / "cache", 10**9)
    contents = []

    def read() -> None:
        with store.open(server.url("0.tar")) as file:
            contents.append(file.read())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(contents) == {(server.folder / "0.tar").read_bytes()} and len(contents) == 8
    assert server.asked["0.tar"] == 1
