import functools
import gzip
import hashlib
import http.server
import os
import runpy
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from infocapsgan.data import files
from infocapsgan.data.files import DataError, File, Source, download, find, folders, unpacked, verify

CONTENT = bytes(range(256)) * 1000
GOOD = File("values.bin", hashlib.sha256(CONTENT).hexdigest())
NOWHERE = "http://127.0.0.1:9/"  # the discard port, where nothing listens


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, of which a request that finds `ends` not empty gets so many bytes."""

    content = CONTENT
    requests: list[str]
    ends: list[int]
    delay = 0.0

    def do_GET(self):
        self.requests.append(self.path)
        end = self.ends.pop(0) if self.ends else None
        time.sleep(self.delay)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Server, "requests", [], raising=False)
    monkeypatch.setattr(Server, "ends", [], raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        threading.Thread(target=functools.partial(served.serve_forever, 0.01), daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}/values.bin"
        served.shutdown()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_download(tmp_path, server, capsys):
    path = download(server, tmp_path / "new" / "values.bin", GOOD)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["values.bin"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    output = capsys.readouterr()
    assert f"downloading {server}" in output.err
    assert "100%" in output.err
    assert not output.out


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_that_is_there_is_not_downloaded(tmp_path, server):
    (tmp_path / "values.bin").write_bytes(CONTENT)
    download(server, tmp_path / "values.bin", GOOD)
    assert Server.requests == []


def fails(kind, server, monkeypatch):
    """A download that fails, and what its error says."""
    if kind == "checksum":
        return (
            server,
            GOOD._replace(checksum="0" * 64),
            DataError,
            f"what came from {server} does not have .*; it",
        )
    if kind == "damaged":
        monkeypatch.setattr(Server, "content", gzip.compress(CONTENT)[:100])
        return server, GOOD, DataError, f"what came from {server} is damaged .*; it was removed, try again"
    if kind == "broken off":
        Server.ends.append(1000)
        return server, GOOD, OSError, "IncompleteRead"
    return NOWHERE, GOOD, OSError, "Connection refused"


@pytest.mark.parametrize("kind", ["checksum", "damaged", "broken off", "no network"])
@pytest.mark.parametrize("there", [False, True])
def test_a_failed_download_leaves_nothing_behind(kind, there, tmp_path, server, monkeypatch):
    url, file, error, message = fails(kind, server, monkeypatch)
    if there:
        (tmp_path / "cache" / "mnist").mkdir(parents=True)
    with pytest.raises(error, match=message):
        download(url, tmp_path / "cache" / "mnist" / "values.bin", file)
    assert list(tmp_path.rglob("*")) == ([tmp_path / "cache", tmp_path / "cache" / "mnist"] if there else [])
    monkeypatch.setattr(Server, "content", CONTENT)
    assert download(server, tmp_path / "cache" / "mnist" / "values.bin", GOOD).read_bytes() == CONTENT


def test_the_file_appears_only_when_it_is_verified(tmp_path, server, monkeypatch):
    path, seen, verify = tmp_path / "values.bin", [], files.verify
    monkeypatch.setattr(files, "verify", lambda *args: seen.append(path.exists()) or verify(*args))
    download(server, path, GOOD)
    assert seen == [False]


def test_several_that_want_a_file_at_once_download_it_once(tmp_path, server, monkeypatch):
    monkeypatch.setattr(Server, "delay", 0.1)

    def get(_):
        return download(server, tmp_path / "new" / "values.bin", GOOD).read_bytes()

    with ThreadPoolExecutor(4) as pool:  # a lock belongs to a file that was opened, not to a process
        assert list(pool.map(get, range(4))) == [CONTENT] * 4
    assert Server.requests == ["/values.bin"]
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "values.bin"]


def test_what_waited_for_a_failed_download_tries_itself(tmp_path, server, monkeypatch):
    monkeypatch.setattr(Server, "delay", 0.1)
    Server.ends.append(1000)

    def get(_):
        try:
            return download(server, tmp_path / "values.bin", GOOD).read_bytes()
        except OSError:
            return None

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(get, range(2))) == {CONTENT, None}
    assert names(tmp_path) == ["values.bin"]


def test_without_a_network_the_error_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.delenv("INFOCAPSGAN_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        find(Source("small", NOWHERE, (GOOD, GOOD._replace(name="labels.bin"))), tmp_path)
    assert f"Put these files into {tmp_path / 'small'}: values.bin, labels.bin" in str(caught.value)


def test_files_are_looked_for_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("INFOCAPSGAN_DATA", str(tmp_path / "second"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    assert folders(tmp_path / "first") == [
        tmp_path / "first",
        tmp_path / "second",
        tmp_path / "third" / "infocapsgan",
    ]
    for place in ("third/infocapsgan", "second"):
        path = tmp_path / place / "small" / "values.bin"
        path.parent.mkdir(parents=True)
        path.write_bytes(CONTENT)
        assert find(Source("small", NOWHERE, (GOOD,))) == [path]


def test_files_that_are_there_are_read_without_pooch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)  # to import it is an error
    fresh = runpy.run_path(files.__file__)
    path = tmp_path / "small" / "values.bin"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert fresh["find"](fresh["Source"]("small", NOWHERE, (GOOD,)), tmp_path) == [path]
    assert fresh["download"](NOWHERE, path, GOOD) == path


def test_a_wrong_file_of_the_user_is_named(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "values.bin").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"small/values\.bin does not have the expected content"):
        find(Source("small", NOWHERE, (GOOD,)), tmp_path)


@pytest.mark.parametrize("content", [CONTENT, gzip.compress(CONTENT)])
@pytest.mark.parametrize("place", ["small", "Other/raw"])
@pytest.mark.parametrize("name", ["values", "values.gz"])
def test_uncompressed_files_and_other_folders_are_looked_into(place, name, content, tmp_path):
    path = tmp_path / place / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    source = Source("small", NOWHERE, (GOOD._replace(name="values.gz"),), ("Other/raw",))
    assert find(source, tmp_path) == [path]
    assert unpacked(path) == CONTENT
    path.write_bytes(CONTENT[1:])
    with pytest.raises(DataError, match=f"{place}/{name} does not have the expected content"):
        find(source, tmp_path)


def test_a_gz_file_is_known_by_what_is_inside(tmp_path):
    path = tmp_path / "values.gz"
    file = GOOD._replace(name="values.gz")
    for level in (1, 9):
        path.write_bytes(gzip.compress(CONTENT, level))
        verify(path, file)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged"):
        verify(path, file)


def test_every_flipped_byte_of_a_gz_file_is_found(tmp_path):
    path, whole = tmp_path / "values.gz", gzip.compress(CONTENT[:64])
    file = File("values.gz", hashlib.sha256(CONTENT[:64]).hexdigest())
    for place in (*range(4), *range(10, len(whole))):  # 4 to 9: time and system, which nothing hangs on
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"values\.gz (is damaged|does not have the expected content)"):
            verify(path, file)
