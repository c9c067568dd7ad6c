"""Credentials in URLs reach no file, no message and no JSON, whatever a command comes to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fsspec.implementations.cached import SimpleCacheFileSystem

import cli
from tec_cache.errors import TecCacheError
from tec_cache.store import open_store
from tec_cache.urls import scrubbed, secrets_in, without_secrets
from tests.conftest import TINY, write_shards
from tests.web_server import WebServer, web_server

SIGNATURE = "hidden/Signature+0123=="
PASSWORD = "hidden:Password-0123"
QUERY = "download=true&sig=hidden%2FSignature%2B0123%3D%3D"

VIEWS = ["--views-only", "--size", "32", "--grid", "4", "--group-size", "4", "--workers", "2"]


# ---- one URL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/a.tar?hidden", "https://host/a.tar"),
        ("https://host/a.tar?x=https://hidden:hidden@host/?y", "https://host/a.tar"),
        ("https://hidden:hidden@host:8080/a@b.tar", "https://host:8080/a@b.tar"),
        ("https://hidden@host/", "https://host/"),
        ("HTTPS://hidden:hid@hidden@host/a.tar", "HTTPS://host/a.tar"),
        ("https://hidden:hid?hidden@host/a.tar", "https://host/a.tar"),
        ("http://hidden:hidden@[::1]:80/a.tar?hidden", "http://[::1]:80/a.tar"),
        ("s3://HIDDEN:hid/hid+hidden@bucket/key.tar", "s3://bucket/key.tar"),
        ("s3://bucket/key.tar?X-Amz-Signature=hidden", "s3://bucket/key.tar"),
        ("sftp://hidden:hidden@host/a.tar", "sftp://host/a.tar"),
        ("simplecache::https://hidden:hidden@host/a.tar?hidden", "simplecache::https://host/a.tar"),
        ("zip://a.tar::https://hidden@host/a.zip?hidden", "zip://a.tar::https://host/a.zip"),
        ("{https://hidden@a/x?hidden,https://hidden@b/y?hidden}", "{https://a/x,https://b/y"),
        ("{http,https}://hidden:hidden@host/a.tar?hidden", "{http,https}://host/a.tar"),
        ("--cache=s3://HIDDEN:hidden@bucket/x", "--cache=s3://bucket/x"),
        # what only looks like credentials stays
        ("s3://bucket/shard-0?.tar", "s3://bucket/shard-0?.tar"),
        ("s3://bucket/part-?/year=2026/a.tar", "s3://bucket/part-?/year=2026/a.tar"),
        ("s3://bucket/a@b:c.tar", "s3://bucket/a@b:c.tar"),
        ("s3://arn:aws:s3:us-east-1:0:accesspoint/x/a@b.tar", "s3://arn:aws:s3:us-east-1:0:accesspoint/x/a@b.tar"),
        ("abfs://container@account/a.tar", "abfs://container@account/a.tar"),
        ("github://org:repo@main/a.tar", "github://org:repo@main/a.tar"),
        ("http://host:8080/a.tar", "http://host:8080/a.tar"),
        ("folder/what?/a=b@c.tar", "folder/what?/a=b@c.tar"),
    ],
)
def test_what_of_a_url_is_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
    assert without_secrets(shown) == shown
    message = scrubbed(f"cannot open URL('{url}') or {url}: no route", url)
    assert "hidden" not in message.lower()
    assert "no route" in message
    assert "hidden" not in str(TecCacheError(f"gone: {url}", where=url, todo=f"look at '{url}'")).lower()
    if shown != url:
        marked = without_secrets(url, marked=True)
        assert "***" in marked
        assert without_secrets(marked) == marked


def test_credentials_that_a_library_took_apart_are_scrubbed_too() -> None:
    url = "https://someone:hidden%2Fword@host/a.tar?sig=hidden%2Fsignature&expires=1"
    for text in ("hidden/word", "hidden%2Fword", "someone:hidden/word", "hidden/signature", "hidden%2Fsignature"):
        assert "hidden" not in scrubbed(f"Invalid value {text!r} for x", url)
    assert "1" not in secrets_in(url), "too short to be told from other numbers"


# ---- commands ------------------------------------------------------------------------------------------------


class Commands:
    """Runs commands in this process, and keeps all that they say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.said = ""

    def __call__(self, *args: object) -> int:
        SimpleCacheFileSystem.clear_instance_cache()  # a new process has no copies
        self.monkeypatch.setattr(sys, "argv", ["tec-cache", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        self.said += "".join(self.capsys.readouterr())
        return int(caught.value.code or 0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Commands:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "torchrun.json"))
    return Commands(monkeypatch, capsys)


@pytest.fixture
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    root = write_shards(tmp_path_factory.mktemp("www"), [5, 3])
    with web_server(root) as server:
        server.signature, server.password = SIGNATURE, PASSWORD
        yield server


def require_no_secret(folder: Path, said: str) -> None:
    """Look at every file below a folder, its name included, and at what was said."""
    for path in folder.rglob("*"):
        assert b"hidden" not in str(path.relative_to(folder)).lower().encode()
        if path.is_file():
            assert b"hidden" not in path.read_bytes().lower(), path
    assert said
    assert "hidden" not in said.lower(), said


Failure = Callable[[WebServer], None]
FAILURES: dict[str, Failure] = {
    "none": lambda web: None,
    "signature expired": lambda web: setattr(web, "signature", "another"),
    "password changed": lambda web: setattr(web, "password", "an:other"),
    "error of the server": lambda web: web.broken.add("shard-000001.tar"),
    "shard gone": lambda web: (web.root / "shard-000001.tar").unlink(),
    "shard cut": lambda web: os.truncate(web.root / "shard-000001.tar", 3000),
    "shard empty": lambda web: os.truncate(web.root / "shard-000001.tar", 0),
    "photo broken": lambda web: spoil(web.root / "shard-000001.tar"),
    "shard changed": lambda web: setattr(web, "root", write_shards(web.root / "other", [5, 4])),
}


def spoil(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:512] + bytes(600) + data[1112:])


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("chain", ["", "simplecache::"])
def test_a_source_leaves_no_secret_anywhere(
    run: Commands, web: WebServer, tmp_path: Path, failure: str, chain: str
) -> None:
    pattern = f"{chain}{web.with_user(PASSWORD, 'shard-{000000..000001}.tar')}?{QUERY}"
    command = ["extract", pattern, "--cache", tmp_path / "cache", *VIEWS, "--views"]
    if failure == "shard changed":
        assert run(*command, 1) == 0
    FAILURES[failure](web)
    expected = {"none": {0}, "shard changed": {2}}.get(failure, {1})
    codes = {run(*command, 2, *more) for more in (["--dry-run"], ["--json"], [], ["--debug"])}
    assert expected <= codes <= expected | {0}  # a dry run reads no photos
    if expected == {1} and chain == "" and failure != "error of the server":
        run(*command, 2, "--on-error", "skip", "--json")
    run("info", tmp_path / "cache", "--json")
    run("verify", tmp_path / "cache", "--full", "--json")
    require_no_secret(tmp_path, run.said)


def test_an_interrupted_command_is_printed_without_them(
    run: Commands, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tec_cache.data.tars import TarShard

    def interrupted(shard: TarShard, passed_over: object = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TarShard, "photos", interrupted)
    monkeypatch.setattr(os, "_exit", sys.exit)
    url = f"{web.with_user(PASSWORD, 'shard-000000.tar')}?{QUERY}"
    assert run("extract", url, f"--cache={tmp_path / 'cache'}", *VIEWS) == 130
    require_no_secret(tmp_path, run.said)
    assert "shard-000000.tar?***" in run.said, "that something has to be filled in is seen"


def test_nothing_is_said_beside_the_messages(web: WebServer, tmp_path: Path) -> None:
    """By a connection that is open when the process ends, for one: in a process of its own."""
    web.broken = {"shard-000001.tar"}
    url = f"{web.with_user(PASSWORD, 'shard-00000N.tar')}?{QUERY}"
    program = """
import sys
from tec_cache.data.remote import connect
from tec_cache.errors import StorageError
(first,), (second,) = (connect(url).files() for url in sys.argv[1:])
first.size()
stream = first.open()
stream.read(100)
try:
    second.size()
except StorageError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, url.replace("N", "0"), url.replace("N", "1")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "500" in ended.stdout
    require_no_secret(tmp_path, ended.stdout)


@pytest.mark.parametrize("word", ["--cahce=s3://hidden:hidden@bucket/x", "https://hidden@host/a?hidden"])
def test_a_mistyped_command_is_not_repeated_with_them(run: Commands, tmp_path: Path, word: str) -> None:
    for more in ([], ["--json"]):
        assert run("extract", "photos.tar", "--cache", tmp_path, word, *more) == 2
    require_no_secret(tmp_path, run.said)


# each with {} where a URL stands
STORES: dict[str, list[str]] = {
    "extract": ["extract", "SHARDS", "--cache", "{}/cache", "--views-only"],
    "extract more": ["extract", "--cache", "{}/cache", "--base", "BASE"],
    "fit": ["fit", "SHARDS", "--cache", "{}/cache", "--base", "BASE"],
    "plan": ["plan", "SHARDS", "--cache", "{}/cache", "--base", "BASE"],
    "train": ["train", "--cache", "{}/cache", "--out", "RUN"],
    "train, run": ["train", "--cache", "CACHE", "--out", "{}/run"],
    "train, stage": ["train", "--cache", "CACHE", "--out", "RUN", "--stage", "{}/stage"],
    "info": ["info", "{}/cache"],
    "verify": ["verify", "{}/cache"],
    "pack": ["pack", "CACHE", "{}/pack"],
    "pack from": ["pack", "{}/cache", "PACK"],
    "unpack": ["unpack", "{}/pack", "CACHE2"],
    "merge": ["merge", "{}/out", "CACHE"],
    "merge from": ["merge", "OUT", "{}/cache"],
    "rm": ["rm", "{}/cache", "--views", "1"],
    "probe": ["probe", "BASE", "--train", "{}/cache", "--test", "SHARDS"],
}


@pytest.mark.parametrize("command", STORES)
@pytest.mark.parametrize("url", ["s3://HIDDEN:hidden/hidden@bucket", "https://127.0.0.1:1/x?hidden=hidden&y="])
def test_a_store_with_credentials_in_its_url_is_refused_without_showing_them(
    run: Commands, tmp_path: Path, tiny_base: Path, shards: Path, made_cache: Path, command: str, url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"SHARDS": shards, "BASE": tiny_base, "CACHE": made_cache}
    words = [str(places.get(word, word)).format(url) for word in STORES[command]]
    for more in ([], ["--json"], ["--debug"]):
        assert run(*words, *more) in (1, 2)
    require_no_secret(tmp_path, run.said)


def test_training_from_a_cache_behind_a_password(run: Commands, made_cache: Path, tmp_path: Path) -> None:
    """A web server can be read from: the password is used, and written nowhere."""
    with web_server(made_cache.parent) as server:
        server.password = PASSWORD
        url = server.with_user(PASSWORD, made_cache.name)
        assert open_store(url).read("cache.json") == (made_cache / "cache.json").read_bytes()
        student = [f"--student-arg={name}={value}" for name, value in TINY.items()]
        args = ["--student", "vit_tiny_patch16_224", *student, "--decoder-width", 32, "--decoder-heads", 4,
                "--batch-size", 32, "--epochs", 2, "--threads", 1, "--device", "cpu"]  # fmt: skip
        assert run("train", "--cache", url, "--out", tmp_path / "run", *args, "--steps", 1) == 0
        assert run("train", "--cache", url, "--out", tmp_path / "run", *args, "--json") == 0
        assert run("info", url) == 0
        assert run("info", url, "--json") == 0
        assert run("verify", url, "--json") == 0
        assert run("merge", tmp_path / "out", url) == 0
        assert run("merge", tmp_path / "out", url, "--json") == 0
        server.password = "an:other"
        assert run("train", "--cache", url, "--out", tmp_path / "run", *args) == 1
        assert run("merge", tmp_path / "out", url, "--debug") == 1
    require_no_secret(tmp_path, run.said)
