"""Downloads from a loopback server: what arrives, what is refused, what every fault says and leaves behind."""

from __future__ import annotations

import gc
import hashlib
import http.server
import io
import stat
import string
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from causaldpo_lib.data import DATASETS, download, load_dataset
from causaldpo_lib.data.download import ARCHIVES, BY_HAND, Archive, fetch, obtain
from causaldpo_lib.errors import StudyError

FILES = {
    "u.data": b"1\t1\t5\t874965758\n1\t2\t4\t874965759\n2\t1\t3\t883888671\n",
    "u.item": "".join(f"{n}|Film {n} (1995)|01-Jan-1995||http://example.org|{'|'.join('0' * 19)}\n" for n in (1, 2)),
    "u.user": b"1|24|M|technician|85711\n2|53|F|other|94043\n",
}
MEMBERS = tuple(f"ml-100k/{name}" for name in FILES)


def packed(files: dict[str, bytes | str] | None = None, link: str | None = None) -> bytes:
    """A zip file in the publisher's layout with what nobody asked for; ``link`` becomes a symbolic link."""
    buffer = io.BytesIO()
    files = {"ml-100k/README": "not wanted"} | {f"ml-100k/{name}": data for name, data in FILES.items()} | (files or {})
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            if name == link:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def encrypted(data: bytes) -> bytes:
    """The same archive, whose directory says that its members are encrypted."""
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        parts = data.split(mark)
        flagged = [part[: offset - 4] + bytes([part[offset - 4] | 1]) + part[offset - 3 :] for part in parts[1:]]
        data = mark.join([parts[0], *flagged])
    return data


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with ``pages`` by path; the archive's connection may be cut or stall after ``sent`` bytes."""

    pages: dict[str, bytes]
    sent: int | None = None
    stall = 0.0
    status = 200
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        content = self.pages.get(self.path)
        self.send_response(self.status if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        sent = self.sent if self.path == "/a.zip" else None
        self.wfile.write((content or b"")[:sent])
        self.wfile.flush()
        time.sleep(self.stall)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def publisher(monkeypatch):
    handler = type("Handler", (Server,), {"pages": {"/a.zip": packed()}, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()
    gc.collect()  # pooch leaves the socket of a failed download to the collector: let it go within the test


def archive_of(publisher, **changes) -> Archive:
    known = {"md5": hashlib.md5(publisher.pages["/a.zip"]).hexdigest()}
    return Archive(**({"url": f"{publisher.address}/a.zip", "members": MEMBERS} | (changes or known)))


leaves_a_socket = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# --- The table of archives ---


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_archive_is_described(name):
    archive = ARCHIVES[name]
    assert archive.url.startswith(("https://files.grouplens.org/", "http://www2.informatik.uni-freiburg.de/"))
    assert archive.url.endswith(".zip") and archive.licence and "\n" not in archive.licence
    digest, length = (archive.md5, 32) if archive.md5 else (archive.sha256, 64)
    if archive.checksum_url:
        assert archive.checksum_url == archive.url + ".md5"
    else:
        assert len(digest) == length and set(digest) <= set(string.hexdigits.lower())
        assert archive.url.startswith("https") or archive.sha256  # what comes unprotected needs the strong one
    names = [Path(member).name for member in archive.members]
    assert len(set(names)) == len(names) > 1
    assert all(".." not in Path(member).parts and not member.startswith("/") for member in archive.members)


@pytest.mark.parametrize("given", [{}, {"md5": "0", "sha256": "0"}, {"sha256": "0", "checksum_url": "x"}])
def test_an_archive_needs_one_checksum(given):
    with pytest.raises(StudyError, match="exactly one"):
        Archive(url="http://127.0.0.1/a.zip", members=(), **given)


@pytest.mark.parametrize("name", BY_HAND)
def test_what_a_person_must_fetch_is_said(name, tmp_path):
    folder = tmp_path / name
    with pytest.raises(StudyError, match=r"does not exist .*https://.* put .* there.*CAUSALDPO_DATA") as raised:
        obtain(name, folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    assert not folder.exists()


def test_obtain_fetches_by_name(publisher, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHIVES, "ml-100k", archive_of(publisher))
    obtain("ml-100k", tmp_path / "here")
    assert (tmp_path / "here" / "u.data").is_file()
    with pytest.raises(StudyError, match="unknown archive 'ml-100'"):
        obtain("ml-100", tmp_path / "there")


# --- What arrives ---


@pytest.mark.parametrize("kind", ["md5", "sha256", "grouplens", "md5sum"])
def test_an_archive_arrives_complete_with_its_licence(kind, publisher, tmp_path, capsys):
    data = publisher.pages["/a.zip"]
    digest = hashlib.md5(data).hexdigest()
    publisher.pages["/a.md5"] = (f"MD5 (a.zip) = {digest}\n" if kind == "grouplens" else f"{digest}  a.zip\n").encode()
    checksum = {
        "md5": {"md5": digest},
        "sha256": {"sha256": hashlib.sha256(data).hexdigest()},
    }.get(kind, {"checksum_url": f"{publisher.address}/a.md5"})
    folder = tmp_path / "new" / "ml-100k"
    fetch(archive_of(publisher, licence="Toy films: for tests only", **checksum), folder)
    for name, content in FILES.items():
        assert (folder / name).read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["ml-100k"]  # no scratch left
    said = capsys.readouterr().err
    assert "Toy films: for tests only" in said and "100%" in said  # the licence, the progress bar
    assert (digest in said) == ("checksum_url" in checksum)  # which edition it was


def test_a_loader_downloads_what_is_absent_once(publisher, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHIVES, "ml-100k", archive_of(publisher))
    monkeypatch.setenv("CAUSALDPO_DATA", str(tmp_path))
    with pytest.warns(UserWarning, match="is not the published MovieLens-100K"):
        first = load_dataset("ml-100k")
    assert (tmp_path / "ml-100k" / "u.data").is_file()
    with pytest.warns(UserWarning, match="is not the published MovieLens-100K"):
        second = load_dataset("ml-100k")
    pd.testing.assert_frame_equal(first.table, second.table)
    assert publisher.asked == ["/a.zip"]


def test_another_process_may_be_faster(publisher, tmp_path, monkeypatch):
    folder = tmp_path / "ml-100k"

    def faster(source, member, place):
        folder.mkdir(exist_ok=True)
        (folder / "u.data").write_bytes(b"theirs")

    monkeypatch.setattr(download, "_extract", faster)
    fetch(archive_of(publisher), folder)
    assert (folder / "u.data").read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [folder]


# --- Faults ---


def refused(archive: Archive, folder: Path, word: str) -> str:
    """The message of a failed download, which has left nothing."""
    before = set(folder.parent.iterdir())
    with pytest.raises(StudyError, match=word) as raised:
        fetch(archive, folder)
    message = str(raised.value)
    assert str(folder) in message and "CAUSALDPO_DATA" in message and archive.url in message and "\n" not in message
    assert set(folder.parent.iterdir()) == before
    return message


@leaves_a_socket
@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"sent": 100}, "the connection was cut"),
        ({"sent": 0}, "the connection was cut"),
        ({"status": 404}, "404"),
        ({"status": 500}, "500"),
        ({"sent": 100, "stall": 0.6}, "the server stopped answering"),
    ],
)
def test_after_a_fault_the_next_download_starts_anew(settings, word, publisher, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    sound = {name: getattr(publisher, name) for name in settings}
    for name, value in settings.items():
        setattr(publisher, name, value)
    refused(archive_of(publisher), tmp_path / "ml-100k", word)
    for name, value in sound.items():
        setattr(publisher, name, value)
    fetch(archive_of(publisher), tmp_path / "ml-100k")
    assert sorted(path.name for path in (tmp_path / "ml-100k").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_another_content_is_refused(kind, publisher, tmp_path):
    wrong = getattr(hashlib, kind)(b"something else").hexdigest()
    refused(archive_of(publisher, **{kind: wrong}), tmp_path / "ml-100k", "does not have the published checksum")


@leaves_a_socket
@pytest.mark.parametrize(
    ("page", "word"),
    [
        (b"MD5 (a.zip) = " + b"0" * 32, "does not have the published checksum"),
        (b"<html>moved</html>", "has no MD5 checksum"),
        (b"0" * 32 + b" " + b"1" * 32, "has no MD5 checksum"),
        (b"", "has no MD5 checksum"),
        (b"\xff" * 40, "has no MD5 checksum"),
        (None, "404"),
    ],
)
def test_a_publishers_checksum_is_obeyed(page, word, publisher, tmp_path):
    if page is not None:
        publisher.pages["/a.md5"] = page
    refused(archive_of(publisher, checksum_url=f"{publisher.address}/a.md5"), tmp_path / "ml-100k", word)


def test_without_a_network_the_message_says_what_to_do(publisher, tmp_path):
    closed = Archive(url="http://127.0.0.1:9/ml-100k.zip", md5="0", members=())
    refused(closed, tmp_path / "ml-100k", r"does not exist .*cannot be reached.*try again.*put the publisher's files")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"no zip file", "BadZipFile"),
        (packed()[:-30], "BadZipFile"),
        (packed(link="ml-100k/u.data"), "u.data in it is not a plain file"),
        (encrypted(packed()), "encrypted"),
        (packed().replace(b"u.user", b"u.nope"), "u.user"),
    ],
    ids=["no-zip", "truncated", "symbolic-link", "encrypted", "member-missing"],
)
def test_an_archive_that_is_not_what_it_should_be_is_refused(data, word, publisher, tmp_path):
    publisher.pages["/a.zip"] = data
    refused(archive_of(publisher), tmp_path / "ml-100k", word)


def test_a_damaged_member_is_refused(publisher, tmp_path):
    data = bytearray(packed({"ml-100k/u.data": bytes(range(256)) * 40}))
    info = zipfile.ZipFile(io.BytesIO(bytes(data))).getinfo("ml-100k/u.data")
    data[info.header_offset + 30 + len(info.filename) + 20] ^= 0xFF
    publisher.pages["/a.zip"] = bytes(data)
    refused(archive_of(publisher), tmp_path / "ml-100k", r"Bad CRC-32|Error -3|failed")


MALICIOUS = ("../escape", "../../escape", "/tmp/causaldpo-escape", "ml-100k/../../escape", "ml-100k\\..\\..\\escape")


def test_no_path_in_an_archive_decides_where_a_file_lands(publisher, tmp_path):
    """Neither unasked for nor, by a mistake in the table of archives, asked for."""
    publisher.pages["/a.zip"] = packed(dict.fromkeys(MALICIOUS, "escaped"))
    place = tmp_path / "deep" / "er"
    archive = archive_of(publisher)
    fetch(archive, place / "ml-100k")
    fetch(replace(archive, members=MALICIOUS[:4]), place / "asked")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    expected = {f"deep/er/ml-100k/{name}" for name in FILES}
    assert found == expected | {"deep/er/asked/escape", "deep/er/asked/causaldpo-escape"}
    assert not Path("/tmp/causaldpo-escape").exists()


def test_a_place_that_cannot_be_written_is_named(publisher, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StudyError, match=r"file.ml-100k does not exist .*(FileExists|NotADirectory)Error"):
        fetch(archive_of(publisher), tmp_path / "file" / "ml-100k")


def test_every_dataset_of_files_is_downloaded_or_by_hand():
    assert not set(ARCHIVES) & set(BY_HAND)
    assert set(DATASETS) - {"simulated", "custom"} <= set(ARCHIVES) | set(BY_HAND)
