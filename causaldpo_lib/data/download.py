"""Fetching a publisher's archive once, checked and all or nothing."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causaldpo_lib.errors import StudyError, pick

TIMEOUT = 30.0  # seconds without an answer or without a further byte


@dataclass(frozen=True)
class Archive:
    """A publisher's zip file and the members a loader reads.

    Exactly one checksum: ``md5`` or ``sha256`` (hexadecimal) of a file that never changes, or ``checksum_url``, where
    the publisher keeps the MD5 of a file that does. The last guards against damage, not against a server that lies.
    ``licence`` is one line, shown before the download.
    """

    url: str
    md5: str = ""
    members: tuple[str, ...] = ()
    sha256: str = ""
    checksum_url: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        if sum(map(bool, (self.md5, self.sha256, self.checksum_url))) != 1:
            raise StudyError(f"the archive {self.url} needs one of md5, sha256 and checksum_url: give exactly one")


GROUPLENS = "https://files.grouplens.org/datasets"
RESEARCH = "research use with acknowledgement (Harper & Konstan 2015), no commercial use without permission"

# Checksums: MovieLens as GroupLens publishes them beside the files; its small release is replaced now and then. The
# publishers of the last two give none: these are taken from several public projects.
ARCHIVES: dict[str, Archive] = {
    "ml-100k": Archive(
        url=f"{GROUPLENS}/movielens/ml-100k.zip",
        md5="0e33842e24a9c977be4e0107933c0723",
        members=("ml-100k/u.data", "ml-100k/u.item", "ml-100k/u.user"),
        licence=f"MovieLens-100K, GroupLens: {RESEARCH}, no redistribution",
    ),
    "ml-1m": Archive(
        url=f"{GROUPLENS}/movielens/ml-1m.zip",
        md5="c4d9eecfca2ab87c1945afe126590906",
        members=("ml-1m/ratings.dat", "ml-1m/movies.dat", "ml-1m/users.dat"),
        licence=f"MovieLens-1M, GroupLens: {RESEARCH}, no redistribution",
    ),
    "ml-10m": Archive(
        url=f"{GROUPLENS}/movielens/ml-10m.zip",
        md5="ce571fd55effeba0271552578f2648bd",
        members=("ml-10M100K/ratings.dat", "ml-10M100K/movies.dat"),
        licence=f"MovieLens-10M, GroupLens: {RESEARCH}, no redistribution",
    ),
    "ml-latest-small": Archive(
        url=f"{GROUPLENS}/movielens/ml-latest-small.zip",
        checksum_url=f"{GROUPLENS}/movielens/ml-latest-small.zip.md5",
        members=("ml-latest-small/ratings.csv", "ml-latest-small/movies.csv"),
        licence=f"MovieLens-latest-small, GroupLens: {RESEARCH}, redistribution under the same terms",
    ),
    "book-crossing": Archive(
        url="http://www2.informatik.uni-freiburg.de/~cziegler/BX/BX-CSV-Dump.zip",
        sha256="adc7b47afb47c8e29e5f0b70a9816569b3367c5588064ba7a916f16e3ef5d060",
        members=("BX-Book-Ratings.csv", "BX-Books.csv", "BX-Users.csv"),
        licence="Book-Crossing: free for research with acknowledgement (Ziegler et al. 2005), no formal licence",
    ),
    "lastfm": Archive(
        url=f"{GROUPLENS}/hetrec2011/hetrec2011-lastfm-2k.zip",
        sha256="6738f48195667ff03caaab4d32ca9a3133d8cc026b7c3cdaf6ce1010e913c59c",
        members=("user_artists.dat", "artists.dat"),
        licence="LastFM, HetRec 2011: non-commercial use with acknowledgement (Cantador et al. 2011)",
    ),
}

# Where terms have to be accepted in person, or the publisher offers no fixed address.
BY_HAND: dict[str, str] = {
    "yelp": "accept Yelp's terms at https://business.yelp.com/data/resources/open-dataset/, download the JSON archive "
    "and put its yelp_academic_dataset_review.json and yelp_academic_dataset_business.json there",
    "amazon": "download a category's reviews and metadata (<category>_5.json.gz and meta_<category>.json.gz) from "
    "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/ and put both there, packed or not",
}


def obtain(name: str, folder: Path) -> None:
    """Download the dataset ``name`` of ``ARCHIVES`` into the new ``folder``, see `fetch`.

    Raises:
        StudyError: the download failed, or a person has to fetch the dataset: what, and where to put it.
    """
    if name in BY_HAND:
        raise StudyError(
            f"{folder} does not exist and {name} cannot be downloaded for you: {BY_HAND[name]}, "
            f"or set CAUSALDPO_DATA to the folder that holds {folder.name}/"
        )
    fetch(pick(ARCHIVES, name, "archive"), folder)


def fetch(archive: Archive, folder: Path) -> None:
    """Download ``archive``, check it and put its members (by their last names) into the new ``folder``.

    The folder appears complete or not at all: files are extracted beside it and renamed at the end. A cut download
    leaves nothing, so that the next starts anew. Only the named members are written, each to a plain name, so that no
    path inside the archive decides where a file lands; a link among them is refused.

    Raises:
        StudyError: no connection, a cut one, another checksum, a member that is missing or no plain file, or a
            folder that cannot be written.
    """
    import pooch  # here, since it is slow to import and most runs download nothing

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            if archive.licence:
                print(archive.licence, file=sys.stderr)
            downloaded = pooch.retrieve(
                archive.url,
                known_hash=_checksum(archive, Path(scratch)),
                fname="archive.zip",
                path=scratch,
                downloader=pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT, chunk_size=1 << 16),
            )
            complete = Path(scratch) / "complete"
            complete.mkdir()
            with zipfile.ZipFile(downloaded) as source:
                for member in archive.members:
                    _extract(source, member, complete)
            _publish(complete, folder)
    # RuntimeError is zipfile's for encrypted and unknown kinds of members.
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as problem:
        raise StudyError(
            f"{folder} does not exist and downloading {archive.url} failed ({_reason(problem)}): try again, "
            f"put the publisher's files there, or set CAUSALDPO_DATA to the folder that holds {folder.name}/"
        ) from problem


def _checksum(archive: Archive, scratch: Path) -> str:
    """``algorithm:digest``; GroupLens' files say ``MD5 (name) = digest``, those of md5sum ``digest  name``."""
    if archive.sha256:
        return f"sha256:{archive.sha256}"
    if archive.md5:
        return f"md5:{archive.md5}"
    import pooch

    path = scratch / "checksum"
    pooch.HTTPDownloader(timeout=TIMEOUT)(archive.checksum_url, str(path), None)
    text = path.read_bytes()[:1000].decode("ascii", errors="replace")
    digests = re.findall(r"\b[0-9a-fA-F]{32}\b", text)
    if len(digests) != 1:
        raise ValueError(f"{archive.checksum_url} has no MD5 checksum")
    print(f"{archive.url}: md5 {digests[0].lower()}", file=sys.stderr)  # which of its editions this is
    return f"md5:{digests[0].lower()}"


def _extract(source: zipfile.ZipFile, member: str, folder: Path) -> None:
    info = source.getinfo(member)
    kind = stat.S_IFMT(info.external_attr >> 16)  # none if packed where files have no such bits
    if kind not in (0, stat.S_IFREG):
        raise ValueError(f"{member} in it is not a plain file")
    with source.open(info) as packed, (folder / Path(member).name).open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)


def _publish(complete: Path, folder: Path) -> None:
    try:
        os.rename(complete, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same checked files
            raise


def _reason(problem: Any) -> str:
    if isinstance(problem, KeyError):
        return str(problem.args[0])
    if isinstance(problem, ValueError) and "hash" in str(problem).lower():
        return "its content does not have the published checksum"
    plain = {
        "ConnectionError": "the server cannot be reached",
        "ConnectTimeout": "the server does not answer",
        "ReadTimeout": "the server stopped answering",
        "ChunkedEncodingError": "the connection was cut",
    }
    name = "ReadTimeout" if "Read timed out" in str(problem) else type(problem).__name__
    return plain.get(name) or f"{name}: {problem}".splitlines()[0][:200]
