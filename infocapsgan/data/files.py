"""Where the files of a data set lie, and how they come there."""

import gzip
import hashlib
import os
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

UNREADABLE = (EOFError, OSError, ValueError, zlib.error)  # what reading a damaged gz file raises


class DataError(RuntimeError):
    """A data file is damaged, or missing and not to be had."""


class File(NamedTuple):
    """A file and the checksum of its content (of what is inside, for a gz file that is no archive)."""

    name: str
    checksum: str
    algorithm: str = "sha256"


class Source(NamedTuple):
    """The files of a data set, the folder that holds them, and the address they come from."""

    folder: str
    url: str
    files: tuple[File, ...]


def folders(data_dir: str | Path | None) -> list[Path]:
    """Where to look, first to last: `data_dir`, $INFOCAPSGAN_DATA, the user's cache folder."""
    named = [data_dir, os.environ.get("INFOCAPSGAN_DATA")]
    return [Path(folder).expanduser() for folder in named if folder] + [cache_folder()]


def cache_folder() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME/infocapsgan, or that in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infocapsgan"


def find(source: Source, data_dir: str | Path | None = None) -> list[Path]:
    """The paths of the files of `source`, each with its checksum verified; missing ones are downloaded.

    They are downloaded into `data_dir` where one is given, else into the user's cache folder.

    Raises:
        DataError: a file does not have its checksum, or is missing and could not be downloaded.
    """
    places = [folder / source.folder for folder in folders(data_dir)]
    for place in places:
        paths = [place / file.name for file in source.files]
        if all(path.is_file() for path in paths):
            for path, file in zip(paths, source.files, strict=True):
                verify(path, file)
            return paths
    target = places[0] if data_dir else places[-1]
    try:
        return [download(source.url + file.name, target / file.name, file) for file in source.files]
    except OSError as error:
        names = [file.name for file in source.files]
        raise unreachable(source.folder, places, source.url, target, names, error) from error


def unreachable(
    name: str, places: list[Path], url: str, target: Path, wanted: list[str], error: OSError
) -> DataError:
    """The error that says which files to put where."""
    return DataError(
        f"the data set {name} is in none of {', '.join(map(str, places))} "
        f"and could not be downloaded from {url} ({error}). "
        f"Put these files into {target}: {', '.join(wanted)}"
    )


def download(url: str, path: Path, file: File, *, open_url: Callable = urllib.request.urlopen) -> Path:
    """Gets one file. What an earlier, broken download left is continued; `path` appears when it is whole.

    Of several processes that want it one gets it, the others wait.

    Raises:
        DataError: what is there, or what came, does not have its checksum; what came is removed.
        OSError: the download failed or broke off.
    """
    if not path.is_file():
        with held(path):
            if not path.is_file():  # another process may have got it meanwhile
                _get(url, path, file, open_url)
                return path
    verify(path, file)
    return path


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Waits until no other process holds `path`, and holds it until the block ends; makes its folder.

    A lock file beside it stays behind. Where the system or the file system has no locks, nothing is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        if fcntl:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _get(url: str, path: Path, file: File, open_url: Callable) -> None:
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = open_url(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to send, the part is whole already
            raise
    else:
        with response:
            _receive(response, part, done if response.status == 206 else 0)
    if wrong := _what_is_wrong(part, file):
        part.unlink()
        raise DataError(f"what came from {url} {wrong}; it was removed, try again to get it anew")
    os.replace(part, path)


def _receive(response, part: Path, done: int) -> None:
    length = response.headers.get("Content-Length")
    total = done + int(length) if length else None
    bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=part.stem, file=sys.stderr)
    with bar, part.open("ab" if done else "wb") as out:
        while chunk := response.read(1 << 16):
            out.write(chunk)
            bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise OSError(
            f"{part.stem} broke off at {part.stat().st_size} of {total} bytes; try again to continue it"
        )


def verify(path: Path, file: File) -> None:
    """Raises DataError where the content of `path` does not have the checksum of `file`."""
    if wrong := _what_is_wrong(path, file):
        raise DataError(f"{path} {wrong}; remove it and get it again")


def unpacked(path: Path) -> bytes:
    """What is inside a gz file; raises DataError where it is damaged."""
    try:
        return gzip.decompress(path.read_bytes())
    except UNREADABLE as error:
        raise DataError(f"{path} is damaged ({error}); remove it and get it again") from error


def _what_is_wrong(path: Path, file: File) -> str:
    """Why the content of `path` is not that of `file`; empty where it is."""
    digest = hashlib.new(file.algorithm)
    opened = gzip.open if file.name.endswith(".gz") and not file.name.endswith(".tar.gz") else open
    try:
        with opened(path, "rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    except UNREADABLE as error:
        return f"is damaged ({error})"
    if digest.hexdigest() == file.checksum:
        return ""
    return (
        f"does not have the expected content: its {file.algorithm} is {digest.hexdigest()}, "
        f"{file.checksum} was expected"
    )
