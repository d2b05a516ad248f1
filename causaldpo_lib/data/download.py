"""Fetching a publisher's archive once, checked and all or nothing."""

from __future__ import annotations

import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from causaldpo_lib.errors import StudyError

TIMEOUT = 30.0  # seconds without an answer or without a further byte


@dataclass(frozen=True)
class Archive:
    """A publisher's zip file: its address, its published MD5 checksum and the members a loader reads."""

    url: str
    md5: str
    members: tuple[str, ...]


def fetch(archive: Archive, folder: Path) -> None:
    """Download ``archive``, check it and put its members (by their last names) into the new ``folder``.

    The folder appears complete or not at all: files are extracted beside it and renamed at the end. Only the
    named members are written, each to a plain name, so that no path inside the archive decides where a file
    lands.

    Raises:
        StudyError: no connection, a cut one, another checksum, or a folder that cannot be written.
    """
    import pooch  # here, since it is slow to import and most runs download nothing

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            downloaded = pooch.retrieve(
                archive.url,
                known_hash=f"md5:{archive.md5}",
                fname="archive.zip",
                path=scratch,
                downloader=pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT),
            )
            complete = Path(scratch) / "complete"
            complete.mkdir()
            with zipfile.ZipFile(downloaded) as source:
                for member in archive.members:
                    (complete / Path(member).name).write_bytes(source.read(member))
            _publish(complete, folder)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as problem:
        raise StudyError(
            f"{folder} does not exist and downloading {archive.url} failed ({_reason(problem)}): "
            f"put the publisher's files there, or set CAUSALDPO_DATA to the folder that holds {folder.name}/"
        ) from problem


def _publish(complete: Path, folder: Path) -> None:
    try:
        os.rename(complete, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same checked files
            raise


def _reason(problem: Exception) -> str:
    if isinstance(problem, ValueError) and "hash" in str(problem).lower():
        return "its content does not have the published checksum"
    plain = {
        "ConnectionError": "the server cannot be reached",
        "ConnectTimeout": "the server does not answer",
        "ReadTimeout": "the server stopped answering",
        "ChunkedEncodingError": "the connection was cut",
    }
    name = type(problem).__name__
    return plain.get(name) or f"{name}: {problem}".splitlines()[0][:200]
