"""Where the files of a data set lie, and how they are downloaded."""

import gzip
import hashlib
import math
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from infocapsgan.engine.atomic import atomic_folder

REMEDY = "remove it and get it again"


class DataError(RuntimeError):
    """A data file is damaged, or is missing and could not be downloaded."""


class File(NamedTuple):
    """A file and the checksum of its content: of what is inside, for a gz file that is no archive."""

    name: str
    checksum: str = ""
    algorithm: str = "sha256"


class Source(NamedTuple):
    """The files of a data set and where they lie; they are below `url`, each by itself or in an archive."""

    folder: str
    url: str
    files: tuple[File, ...]
    other_folders: tuple[str, ...] = ()
    archive: File | None = None


def folders(data_dir: str | Path | None) -> list[Path]:
    """Where to look, first to last: `data_dir`, $INFOCAPSGAN_DATA, the user's cache folder."""
    named = [data_dir, os.environ.get("INFOCAPSGAN_DATA")]
    return [Path(folder).expanduser() for folder in named if folder] + [cache_folder()]


def cache_folder() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME/infocapsgan, or that in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infocapsgan"


def find(source: Source, data_dir: str | Path | None = None) -> list[Path]:
    """The paths of the files of `source`, each with its checksum verified; missing ones are downloaded.

    A file NAME.gz may also lie there uncompressed, as NAME. Downloads go to `data_dir`, or the cache folder.
    """
    for folder in folders(data_dir):
        for layout in (source.folder, *source.other_folders):
            if paths := _lying_in(folder / layout, source):
                return paths
    places = [folder / source.folder for folder in folders(data_dir)]
    target = places[0] if data_dir else places[-1]
    try:
        if source.archive:
            return _unpack(source, source.archive, target)
        return [download(source.url + file.name, target / file.name, file) for file in source.files]
    except OSError as error:
        missing = f"the data set {source.folder} is in none of {', '.join(map(str, places))} and could not be"
        remedy = f"Put these files into {target}: {', '.join(file.name for file in source.files)}"
        raise DataError(f"{missing} downloaded from {source.url} ({error}). {remedy}") from error


def _lying_in(folder: Path, source: Source) -> list[Path]:
    """The verified files of `source` in a folder, empty where one is missing."""
    choices = [(folder / file.name, folder / file.name.removesuffix(".gz")) for file in source.files]
    paths = [path for pair in choices for path in [path for path in pair if path.is_file()][:1]]
    if len(paths) < len(source.files):
        return []
    for path, file in zip(paths, source.files, strict=True):
        verify(path, file)
    return paths


def _unpack(source: Source, archive: File, target: Path) -> list[Path]:
    with locked(target):
        if not (paths := _lying_in(target, source)):  # another process may have made them meanwhile
            path = download(source.url + archive.name, target.parent / archive.name, archive)
            with tarfile.open(path) as packed, atomic_folder(target) as temporary:
                for file in source.files:
                    content = packed.extractfile(f"{source.folder}/{file.name}")
                    (temporary / file.name).write_bytes(content.read())  # type: ignore[union-attr]
            paths = _lying_in(target, source)
    return paths


def download(url: str, path: Path, file: File) -> Path:
    """Downloads one file, unless it is there; `path` appears only when its content is whole and verified.

    Of several processes that want it one downloads it, the others wait. A failed download leaves nothing.
    """
    with locked(path) as folder, TemporaryDirectory(prefix=f".{path.name}.", dir=folder) as temporary:
        if path.is_file():  # another process may have downloaded it meanwhile
            verify(path, file)
        else:
            from pooch import HTTPDownloader  # here, so that reading data needs no pooch

            print(f"downloading {url}", file=sys.stderr)
            received = Path(temporary) / path.name
            HTTPDownloader(progressbar=True)(url, str(received), None)
            verify(received, file, f"what came from {url}", "it was removed, try again to get it anew")
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(received, path)
    return path


@contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Keeps other processes that want to make `path` waiting; gives the nearest folder above that exists."""
    # No folder is made for the lock, so that a block that fails has none to remove.
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    lock = folder / f".{path.name}.lock"
    with FileLock(lock):
        try:
            yield folder
        finally:
            with suppress(PermissionError):  # Windows keeps open files; filelock itself removes them there
                lock.unlink(missing_ok=True)


def verify(path: Path, file: File, name: str = "", remedy: str = REMEDY) -> None:
    """Raises DataError where the content of `path` does not have the checksum of `file`, if that has one."""
    if not file.checksum:
        return
    content = path.read_bytes() if file.name.endswith(".tar.gz") else unpacked(path, name, remedy)
    digest = hashlib.new(file.algorithm, content).hexdigest()
    if digest != file.checksum:
        wrong = f"its {file.algorithm} is {digest}, {file.checksum} was expected"
        raise DataError(f"{name or path} does not have the expected content: {wrong}; {remedy}")


def unpacked(path: Path, name: str = "", remedy: str = REMEDY) -> bytes:
    """The content of a file, decompressed where it is a gz file; raises DataError where that is damaged."""
    try:
        content = path.read_bytes()
        # By what it is, not by its name: some servers and browsers decompress what they transfer.
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise DataError(f"{name or path} is damaged ({error}); {remedy}") from error


def values(path: Path, content: bytes, shape: list[int], dtype: str) -> Tensor:
    """A tensor of what `content`, which `path` has behind its header, holds in the order of its axes."""
    if len(content) != math.prod(shape) * np.dtype(dtype).itemsize:
        raise DataError(f"{path} has {len(content)} bytes of values where its header says {shape}")
    return torch.from_numpy(np.frombuffer(content, dtype).reshape(shape).copy())
