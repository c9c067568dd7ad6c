"""Where shards lie: paths that look like patterns, URLs with queries, chains of them, and what is no file at all."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.extract import extract
from tec_cache.cache.opening import open_cache
from tec_cache.data.photos import Shard
from tec_cache.data.source import open_source
from tec_cache.errors import ConfigError, SourceError, StorageError
from tests.conftest import encoded, photo, tiny_config, write_shards, write_tar
from tests.s3_server import S3Server, s3_server
from tests.web_server import WebServer, web_server

JPEG = encoded(photo(0))


def find_shards(source: str) -> list[Shard]:
    return open_source(source).shards


def names(shards: Any) -> list[str]:
    return [shard.name for shard in shards]


def keys(shards: Any) -> list[str]:
    return [item.key for shard in shards for item in shard.photos()]


def tar(path: Path, *keys: str) -> Path:
    return write_tar(path, [(f"{key}.jpg", JPEG) for key in keys or ("a",)])


# ---- paths of a disk -----------------------------------------------------------------------------------------

# anything that a name may hold, patterns' own letters above all; a backslash is braceexpand's escape
NAMES = st.text(
    st.one_of(
        st.sampled_from("[]*?!-{},.:%+#&=@ ~()'\"éß漢"), st.characters(exclude_characters="/\0\\", codec="utf-8")
    ),
    min_size=1,
    max_size=12,
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 100)


@settings(
    derandomize=True,
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(folder=NAMES, name=NAMES)
def test_an_existing_path_is_taken_as_it_is(tmp_path: Path, folder: str, name: str) -> None:
    root = tmp_path / "root"
    shutil.rmtree(root, ignore_errors=True)
    path = tar(root / folder / f"{name}.tar")
    (shard,) = find_shards(str(path))
    assert (shard.name, shard.place) == (path.name, str(path))
    assert keys([shard]) == ["a"]
    (again,) = find_shards(f"file://{path}")
    assert again.identity() == shard.identity()
    if not name.startswith("."):
        assert names(find_shards(str(path.parent))) == [path.name]


@settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(folder=NAMES.filter(lambda name: not set(name) & set("{}")))
def test_patterns_below_a_folder_of_any_name(tmp_path: Path, folder: str) -> None:
    root = tmp_path / "root"
    shutil.rmtree(root, ignore_errors=True)
    for number in range(2):
        tar(root / folder / f"s-{number}.tar", f"k{number}")
    for pattern in ("s-{0..1}.tar", "s-*.tar", "s-?.tar", "s-[01].tar"):
        assert keys(find_shards(f"{root / folder}/{pattern}")) == ["k0", "k1"], pattern


def test_a_literal_folder_goes_before_those_that_it_matches_as_a_pattern(tmp_path: Path) -> None:
    tar(tmp_path / "set[1]" / "s-0.tar", "literal")
    tar(tmp_path / "set1" / "s-0.tar", "matched")
    assert keys(find_shards(f"{tmp_path}/set[1]/s-*.tar")) == ["literal"]
    assert keys(find_shards(f"{tmp_path}/set[[]1]/s-*.tar")) == ["literal"]
    assert keys(find_shards(f"{tmp_path}/set[!2]/s-*.tar")) == ["matched"]
    # beyond a pattern nothing can be looked for as it is written
    assert keys(find_shards(f"{tmp_path}/*/s-[0].tar")) == ["matched", "literal"]
    tar(tmp_path / "set1" / "s-[0].tar", "itself")
    assert keys(find_shards(f"{tmp_path}/set1/s-[0].tar")) == ["itself"]


def test_braces_may_list_folders_of_tars(tmp_path: Path) -> None:
    write_shards(tmp_path / "x", [1, 1])
    write_shards(tmp_path / "y", [1])
    (tmp_path / "photos").mkdir()
    found = find_shards(f"{tmp_path}/{{x,y}}")
    assert names(found) == ["x/shard-000000.tar", "x/shard-000001.tar", "y/shard-000000.tar"]
    with pytest.raises(SourceError, match="holds no tars") as caught:
        find_shards(f"{tmp_path}/{{x,photos}}")
    assert caught.value.where == f"{tmp_path}/photos"


def test_hidden_files_are_no_shards(tmp_path: Path) -> None:
    """AppleDouble files of an archive that a Mac made, for one."""
    tar(tmp_path / "s-0.tar")
    (tmp_path / "._s-0.tar").write_bytes(b"resource fork")
    assert names(find_shards(str(tmp_path))) == names(find_shards(f"{tmp_path}/*.tar")) == ["s-0.tar"]
    tar(tmp_path / ".hidden.tar")
    assert names(find_shards(f"{tmp_path}/.hid*.tar")) == [".hidden.tar"]


def test_a_path_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tar(tmp_path / "photos" / "s-0.tar")
    assert names(find_shards("~/photos/s-*.tar")) == ["s-0.tar"]
    assert names(find_shards("~/photos")) == ["s-0.tar"]


@pytest.mark.parametrize("text", ["x{1", "s3://bucket/{a,b.tar", "https://me:word@host/{a?sig=0123456789"])
def test_braces_that_do_not_match_are_refused(text: str) -> None:
    with pytest.raises(SourceError, match="braces") as caught:
        find_shards(text)
    assert "word" not in str(caught.value)
    assert "sig" not in str(caught.value)


@pytest.mark.parametrize("text", ["a\0b.tar", "x" * 300 + ".tar", "x" * 5000, "/" * 50 + "no.tar"])
def test_a_text_that_is_no_path_is_a_shard_that_is_not_there(text: str) -> None:
    with pytest.raises((SourceError, StorageError)):
        find_shards(text)


@pytest.mark.parametrize(
    "braces", ["{0..99999999999999}", "{00..-9999999}", "{0..999999}{a,b}", "{a,{b,{0..1000000}}}"]
)
def test_braces_have_a_bound(tmp_path: Path, braces: str) -> None:
    with pytest.raises(SourceError, match="more than 100,000"):
        find_shards(f"{tmp_path}/{braces}.tar")


def test_one_file_under_two_spellings_is_named_twice(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar")
    with pytest.raises(SourceError, match="named twice"):
        find_shards(f"{tmp_path}/{{a,./a}}.tar")


# ---- what is no file -----------------------------------------------------------------------------------------


def special(path: Path, kind: str) -> None:
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(path))
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End the test, and with it the process, where something waits for what never comes."""
    timer = threading.Timer(60, os._exit, (1,))
    timer.start()
    yield
    timer.cancel()


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device", "a folder"])
def test_what_is_no_file_is_refused_before_it_is_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket has a bound
    write_shards(tmp_path / "in", [1])
    bad = tmp_path / "in" / "shard-000001.tar"
    special(bad, kind)
    patterns = ("", "/*.tar", "/shard-{000000..000001}.tar") if kind != "a folder" else ("", "/*.tar")
    for text in (f"{tmp_path}/in{pattern}" for pattern in patterns):
        with pytest.raises(SourceError, match=f"this is {kind}, not a file") as caught:
            find_shards(text)
        assert caught.value.where == str(bad)
    for text in (f"simplecache::file://{bad}", f"zip://a.tar::{bad}"):
        with pytest.raises(SourceError, match="not a file"):
            find_shards(text)
    if kind != "a folder":
        with pytest.raises(SourceError, match=f"this is {kind}, not a file"):
            find_shards(str(bad))


@pytest.mark.usefixtures("within")
def test_what_takes_the_place_of_a_shard_later_is_refused_too(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar")
    (shard,) = find_shards(str(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SourceError, match="a FIFO"):
        list(shard.photos())
    with pytest.raises(SourceError, match="a FIFO"):
        shard.identity()


@pytest.mark.usefixtures("within")
def test_special_files_among_photos_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "1.jpg").write_bytes(JPEG)
    for number, kind in enumerate(("a FIFO", "a socket", "a device", "a folder")):
        special(tmp_path / "in" / "cat" / f"special{number}.jpg", kind)
    (shard,) = find_shards(str(tmp_path / "in"))
    assert keys([shard]) == ["cat/1.jpg"]
    assert shard.identity()["size"] == len(JPEG)


def test_a_link_into_nowhere_is_a_shard_that_is_not_there(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar")
    (tmp_path / "b.tar").symlink_to("gone.tar")
    with pytest.raises(SourceError, match="no such file or folder") as caught:
        find_shards(str(tmp_path))
    assert caught.value.where == str(tmp_path / "b.tar")


# ---- web servers ---------------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    """A server of two shards: a small one, and one of 200 KB."""
    root = tmp_path / "www"
    tar(root / "shard-000000.tar", "a", "b")
    noise = os.urandom(200_000)
    write_tar(
        root / "shard-000001.tar",
        [("c.jpg", JPEG), ("c.bin", noise), ("c.cls", b"0"), ("d.jpg", JPEG), ("d.cls", b"1")],
    )
    with web_server(root) as server:
        yield server


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("chain", ["", "simplecache::"])
def test_every_kind_of_server_gives_the_same_shards(
    web: WebServer, ranges: bool, length: bool, head: bool, chain: str
) -> None:
    """With and without parts of a file, sizes and HEAD: nothing of it is in an identity."""
    local = find_shards(str(web.root))
    web.ranges, web.length, web.head = ranges, length, head
    found = find_shards(chain + web.url("shard-{000000..000001}.tar"))
    assert [shard.identity() for shard in found] == [shard.identity() for shard in local]
    assert [shard.size for shard in found] == [shard.size for shard in local]
    assert [list(shard.photos()) for shard in found] == [list(shard.photos()) for shard in local]


def test_contents_are_two_small_requests(web: WebServer) -> None:
    shard = find_shards(web.url("shard-000001.tar"))[0]
    web.asked.clear()
    shard.identity()
    assert [asked.size for asked in web.asked] == [64 * 1024] * 2
    web.asked.clear()
    list(shard.photos())
    assert [asked.size for asked in web.asked] == [shard.size]


@pytest.mark.parametrize("pattern", ["shard-{000000..000001}.tar", "shard-*.tar", "shard-00000[01].tar"])
@pytest.mark.parametrize("chain", ["", "simplecache::"])
def test_a_question_mark_begins_the_query(web: WebServer, pattern: str, chain: str) -> None:
    web.signature = "a/b+c*[1]?"
    query = "download=true&sig=a%2Fb%2Bc*[1]?"
    found = find_shards(f"{chain}{web.url(pattern)}?{query}")
    assert names(found) == ["shard-000000.tar", "shard-000001.tar"]
    assert [shard.place for shard in found] == [f"{chain}{web.url(shard.name)}" for shard in found]
    assert [list(shard.photos()) for shard in found] == [list(shard.photos()) for shard in find_shards(str(web.root))]
    assert [s.identity() for s in found] == [s.identity() for s in find_shards(str(web.root))]


def test_signatures_of_their_own_in_braces(web: WebServer) -> None:
    urls = [f"{web.url(f'shard-00000{i}.tar')}?sig={i}" for i in (1, 0)]
    found = find_shards("{" + ",".join(urls) + "}")
    assert names(found) == ["shard-000001.tar", "shard-000000.tar"]
    assert keys(found) == ["c", "d", "a", "b"]
    with pytest.raises(SourceError, match="two URLs name one shard"):
        find_shards(f"{web.url('shard-000000.tar')}?sig={{1,2}}")


def test_a_password_in_a_url_opens_it_and_is_in_no_name(web: WebServer) -> None:
    web.password = "me:pass/word"
    found = find_shards(web.with_user("me:pass%2Fword", "shard-*.tar"))
    assert names(found) == ["shard-000000.tar", "shard-000001.tar"]
    assert [shard.place for shard in found] == [web.url(name) for name in names(found)]
    assert keys(found) == ["a", "b", "c", "d"]
    with pytest.raises(StorageError, match="401") as caught:
        find_shards(web.with_user("me:other-word", "shard-000000.tar"))
    assert "other-word" not in str(caught.value)
    assert "password" in caught.value.todo


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("a+b #1.tar", "a+b%20%231.tar"),
        ("a+b #1.tar", "a+b #1.tar"),
        ("100%25.tar", "100%2525.tar"),
        ("café.tar", "café.tar"),
        ("café.tar", "caf%C3%A9.tar"),
        ("set[1].tar", "set[1].tar"),
        ("x?y.tar", "x%3Fy.tar"),
        ("a&b=c.tar", "a&b=c.tar"),
    ],
)
def test_odd_names_of_a_server_are_those_of_its_disk(web: WebServer, name: str, url: str) -> None:
    tar(web.root / "odd" / name)
    (found,) = find_shards(web.url(f"odd/{url}"))
    (local,) = find_shards(str(web.root / "odd"))
    assert found.identity() == local.identity()
    assert keys([found]) == ["a"]
    (globbed,) = find_shards(web.url("odd/*.tar"))
    assert globbed.identity() == local.identity()


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        ({"signature": "new"}, StorageError, "403"),
        ({"password": "me:word"}, StorageError, "401"),
        ({"broken": {"shard-000000.tar"}}, StorageError, "500"),
        ({"root": Path("/nowhere")}, SourceError, "no such file or folder"),
    ],
)
def test_what_a_server_refuses_is_said_without_the_query(
    web: WebServer, change: dict[str, Any], kind: type[Exception], what: str
) -> None:
    for name, value in change.items():
        setattr(web, name, value)
    with pytest.raises(kind, match=what) as caught:
        find_shards(f"{web.url('shard-000000.tar')}?sig=old-signature")
    assert "old-signature" not in str(caught.value)
    assert web.url("shard-000000.tar") in str(caught.value)


def test_a_missing_shard_of_a_server_names_the_nearest(web: WebServer) -> None:
    with pytest.raises(SourceError, match=r"no such file or folder \(did you mean shard-00000"):
        find_shards(f"{web.url('shard-0000001.tar')}?sig=1")


def test_an_address_with_colons_is_no_chain() -> None:
    with pytest.raises(StorageError) as caught:
        find_shards("http://[::1]:1/a.tar?sig=hidden-word")
    assert caught.value.where == "http://[::1]:1/a.tar"
    assert "hidden-word" not in str(caught.value)


# ---- chains --------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/places", recursive=True)


def test_tars_in_a_zip(tmp_path: Path, memory: Any) -> None:
    """Many at a time: their ends are read by several threads from one archive."""
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(24):
            file = write_tar(tmp_path / "s" / f"s-{number:02d}.tar", [("a.jpg", JPEG), ("a.bin", os.urandom(150_000))])
            archive.write(file, f"in/{file.name}")
    memory.pipe_file("/places/photos.zip", path.read_bytes())
    local = [shard.identity() for shard in find_shards(str(tmp_path / "s"))]
    for url in (f"zip://in/*.tar::{path}", "zip://in/s-{00..23}.tar::memory://places/photos.zip",
                f"zip://in/*.tar::simplecache::file://{path}"):  # fmt: skip
        found = find_shards(url)
        assert [shard.identity() for shard in found] == local
        assert keys(found) == ["a"] * 24
    with pytest.raises(SourceError, match="one archive"):
        find_shards(f"zip://a.tar::{tmp_path}/*.gone")
    with pytest.raises(SourceError, match="one archive"):
        find_shards(f"zip://a.tar::{tmp_path}/gone.zip")


def test_a_copy_of_the_whole_file_behind_simplecache(tmp_path: Path, memory: Any) -> None:
    memory.pipe_file("/places/s-0.tar", tar(tmp_path / "s-0.tar").read_bytes())
    (found,) = find_shards("simplecache::memory://places/s-*.tar")
    (local,) = find_shards(str(tmp_path))
    assert found.identity() == local.identity()
    assert keys([found]) == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        "a.tar::b.tar",
        "x-{0..1}.tar::y-{0..1}.tar",
        "memory://a.tar::memory://b.tar",
        "filecache::https://me:secret-word@host/a.tar?sig=secret-word",
        "blockcache::memory://a.tar",
        "tar://a.tar::memory://b.tar",
        "reference::memory://b.json",
        "nonsense::memory://b.tar",
        "::memory://b.tar",
        "memory://b.tar::",
    ],
)
def test_other_chains_are_refused_with_a_reason(text: str) -> None:
    with pytest.raises(SourceError, match="cannot stand before `::`") as caught:
        find_shards(text)
    assert "secret-word" not in str(caught.value)
    assert "braces" in caught.value.todo


def test_a_local_name_with_colons_is_taken_as_it_is(tmp_path: Path) -> None:
    tar(tmp_path / "a::b.tar")
    assert names(find_shards(f"{tmp_path}/a::b.tar")) == ["a::b.tar"]


# ---- object stores -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 whose listings have 10 keys to a page, as Amazon's have 1,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
        with s3_server(tmp_path_factory.mktemp("s3")) as server:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            server.create_bucket("photos")
            yield server


ODD = ("a+b #1.tar", "100%25.tar", "café.tar", "set[1].tar", "x?y.tar", "a::b.tar", "a@b:c.tar", "{x}.tar")


def test_odd_names_and_more_keys_than_one_page_of_a_listing(s3: S3Server, tmp_path: Path) -> None:
    data = tar(tmp_path / "a.tar").read_bytes()
    fs = fsspec.filesystem("s3")
    for name in ODD:
        fs.pipe_file(f"photos/odd [1] names/{name}", data)
    for number in range(34):
        fs.pipe_file(f"photos/many/shard-{number:06d}.tar", data)
    fs.invalidate_cache()
    found = find_shards("s3://photos/odd [1] names/*.tar")
    assert names(found) == sorted(ODD)
    assert keys(found) == ["a"] * len(ODD)
    for name in set(ODD) - {"a::b.tar"}:  # which a pattern finds
        (shard,) = find_shards(f"s3://photos/odd [1] names/{name}")
        assert shard.name == name
    with s3.requests() as requests:
        found = find_shards("s3://photos/many/shard-*.tar")
    assert sum("list-type=2" in request.path for request in requests) >= 4
    # one looks for a shard of this very name; the listing tells all sizes
    assert [request.path for request in requests if request.method == "HEAD"] == ["/photos/many/shard-*.tar"]
    assert names(found) == [f"shard-{i:06d}.tar" for i in range(34)]
    assert {shard.size for shard in found} == {len(data)}
    with pytest.raises(SourceError, match="a folder") as caught:
        find_shards("s3://photos/many")
    assert "s3://photos/many/*.tar" in caught.value.todo


@pytest.mark.parametrize("user", ["HIDDEN:hidden", "HIDDEN:hidden/hidden+/x", "HIDDEN:hid@hidden"])
def test_credentials_that_would_not_be_used_are_refused(user: str) -> None:
    with pytest.raises(ConfigError, match="takes no user") as caught:
        find_shards(f"s3://{user}@photos/a.tar")
    assert caught.value.where == "s3://photos/a.tar"
    assert "hidden" not in str(caught.value).lower()


# ---- going on ------------------------------------------------------------------------------------------------


def test_a_renewed_signature_goes_on_with_the_same_cache(web: WebServer, tmp_path: Path) -> None:
    url, cache = web.url("shard-{000000..000001}.tar"), tmp_path / "cache"
    web.signature = "monday-0123456789"
    extract(
        tiny_config(None, cache, None, input=f"{url}?sig={web.signature}", views=1, size=32, views_only=True, limit=1)
    )
    web.signature = "tuesday-0123456789"
    url = f"simplecache::{url}?x=1&sig={web.signature}"
    summary = extract(tiny_config(None, cache, None, input=url, views=2, size=32, views_only=True))
    assert (summary.photos, summary.views_made) == (1, 1)
    assert open_cache(cache).shards == ["shard-000000.tar"]


def test_shards_compare_by_what_they_are(tmp_path: Path) -> None:
    shards: list[Shard] = list(find_shards(str(write_shards(tmp_path, [1, 1]))))
    assert len({shard.identity()["ends_sha256"] for shard in shards}) == 2
