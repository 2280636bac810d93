import functools
import gzip
import hashlib
import http.server
import runpy
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from infocapsgan.data import files
from infocapsgan.data.files import DataError, File, Source, download, find, folders, verify

CONTENT = bytes(range(256)) * 1000
GOOD = File("values.bin", hashlib.sha256(CONTENT).hexdigest())
NOWHERE = "http://127.0.0.1:9/"  # the discard port, where nothing listens


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, from the byte that is asked for."""

    content = CONTENT
    asked: list[str | None]

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        threading.Thread(target=functools.partial(served.serve_forever, 0.01), daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}/values.bin"
        served.shutdown()


def visible(folder):
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_download(tmp_path, server):
    path = download(server, tmp_path / "new" / "values.bin", GOOD)
    assert path.read_bytes() == CONTENT
    assert visible(path.parent) == ["values.bin"]
    assert Server.asked == [None]


def test_a_broken_download_is_continued(tmp_path, server):
    (tmp_path / "values.bin.part").write_bytes(CONTENT[:1000])
    assert download(server, tmp_path / "values.bin", GOOD).read_bytes() == CONTENT
    assert Server.asked == ["bytes=1000-"]


def test_a_whole_part_needs_no_more(tmp_path, server):
    (tmp_path / "values.bin.part").write_bytes(CONTENT)
    assert download(server, tmp_path / "values.bin", GOOD).read_bytes() == CONTENT


def test_a_download_with_a_wrong_checksum_leaves_nothing(tmp_path, server):
    with pytest.raises(DataError, match="does not have the expected content"):
        download(server, tmp_path / "values.bin", GOOD._replace(checksum="0" * 64))
    assert visible(tmp_path) == []


def test_several_that_want_a_file_at_once_download_it_once(tmp_path, server):
    def slow(request, timeout):
        time.sleep(0.1)
        return urllib.request.urlopen(request, timeout=timeout)

    def get(_):
        return download(server, tmp_path / "values.bin", GOOD, open_url=slow).read_bytes()

    with ThreadPoolExecutor(4) as pool:  # a lock belongs to a file that was opened, not to a process
        assert list(pool.map(get, range(4))) == [CONTENT] * 4
    assert Server.asked == [None]
    assert visible(tmp_path) == ["values.bin"]


def test_what_waited_for_a_broken_download_goes_on_with_it(tmp_path, server):
    ends = iter((1000, None))

    def broken(request, timeout):
        response = urllib.request.urlopen(request, timeout=timeout)
        end, whole = next(ends), response.read
        if end:
            chunks = iter((whole()[:end], b""))
            response.read = lambda _: next(chunks)
        return response

    def get(_):
        try:
            return download(server, tmp_path / "values.bin", GOOD, open_url=broken).read_bytes()
        except OSError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(get, range(2)))
    assert CONTENT in found
    assert f"values.bin broke off at 1000 of {len(CONTENT)} bytes; try again to continue it" in found
    assert Server.asked == [None, "bytes=1000-"]


def test_without_locks_files_are_downloaded_all_the_same(tmp_path, server, monkeypatch):
    def refused(*_):
        raise OSError("not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refused)
    assert download(server, tmp_path / "one" / "values.bin", GOOD).read_bytes() == CONTENT
    monkeypatch.setitem(sys.modules, "fcntl", None)
    elsewhere = runpy.run_path(files.__file__)
    assert elsewhere["download"](server, tmp_path / "two" / "values.bin", GOOD).read_bytes() == CONTENT


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


def test_a_wrong_file_of_the_user_is_named(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "values.bin").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"small/values\.bin does not have the expected content"):
        find(Source("small", NOWHERE, (GOOD,)), tmp_path)


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


def test_a_damaged_part_is_removed_and_got_anew(tmp_path, server, monkeypatch):
    packed = gzip.compress(CONTENT)
    monkeypatch.setattr(Server, "content", packed)
    file = GOOD._replace(name="values.gz")
    part = tmp_path / "values.gz.part"
    part.write_bytes(packed[:10] + b"\xff" + packed[11:100])
    with pytest.raises(DataError, match="is damaged .* it was removed, try again") as caught:
        download(server, tmp_path / "values.gz", file)
    assert server in str(caught.value)
    assert not part.exists()
    assert download(server, tmp_path / "values.gz", file).read_bytes() == packed
