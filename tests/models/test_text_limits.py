"""Texts that are larger than they look, and data sets that lead elsewhere."""

import bz2
import gzip
import hashlib
import json
import lzma
import resource
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow
import pyarrow.parquet
import pytest

from pho_service.errors import InvalidInput, TextError
from pho_service.models import texts
from pho_service.models.data_sets import TextLimits, TextSource, TextTooLong
from pho_service.models.texts import read_documents

MEMORY_BYTES = 64 * 2**20  # that any of them may take beside what the tests have
LIMITS = TextLimits(document_bytes=2**20, text_bytes=2**21)
LOW = TextLimits(document_bytes=2**18, text_bytes=2**19)  # reached in less time
ROW = b'{"text": "a text"}\n'


def read(source, *, whole=True, limits=LIMITS):
    return list(read_documents(source, limits, whole=whole))


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sparse(path, size, head=b""):
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def bomb(path):
    """A parquet file of some hundred bytes and 20,000 rows of a megabyte each."""
    row = pyarrow.array(["x" * 10**6])
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20_000, pyarrow.int32()), row)
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, compression="zstd")
    assert path.stat().st_size < 1000
    return path


def test_what_is_beyond_a_limit_is_not_read_whatever_a_file_declares(tmp_path):
    names = {
        "sparse.txt": sparse(tmp_path / "sparse.txt", 10**10),
        "sparse.jsonl": sparse(tmp_path / "sparse.jsonl", 10**10, ROW),
        "bomb.parquet": bomb(tmp_path / "bomb.parquet"),
    }
    (tmp_path / "set").mkdir()
    packed = gzip.compress(b"\n" * 2**26, 1, mtime=0)
    (tmp_path / "set" / "blank.jsonl.gz").write_bytes(packed)
    line = gzip.compress(b'{"text": "' + b"x" * 2**26, 1, mtime=0)
    (tmp_path / "set" / "line.json.gz").write_bytes(line)
    (tmp_path / "set" / "list.json").write_bytes(b"[\n" + b"[],\n" * 2**20)
    (tmp_path / "set" / "cell.csv").write_bytes(b'text\n"' + b"x\n" * 2**20)
    bomb(tmp_path / "set" / "set.parquet")
    sources = {name: TextSource(path=str(path)) for name, path in names.items()}
    for file in (tmp_path / "set").iterdir():
        sources[file.name] = TextSource(dataset=str(tmp_path / "set"), data_file=file.name)
    before = peak_bytes()
    for name, source in sources.items():
        for whole in (True, False):
            with pytest.raises(TextError) as caught:
                read(source, whole=whole, limits=LOW)

            assert isinstance(caught.value, TextTooLong), name
            assert name in str(caught.value)
            assert "let the operator raise PHO_MAX_" in str(caught.value)

    assert peak_bytes() - before < MEMORY_BYTES


def test_largest_text(tmp_path):
    """Just as much as is allowed is read, and a text in parts may be longer than one as a whole."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 2**20)
    assert read(TextSource(path=str(path))) == ["x" * 2**20]
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"text": "y" * 2**19}) + "\n")
    rows.write_text(rows.read_text() * 3)

    assert len(read(TextSource(path=str(rows)), whole=False)) == 3
    with pytest.raises(TextTooLong, match="raise PHO_MAX_DOCUMENT_BYTES"):
        read(TextSource(path=str(rows)))


def test_pool(tmp_path, monkeypatch):
    """A sample is drawn from the documents before the limit; a first one beyond it is refused."""
    monkeypatch.setenv("PHO_MAX_TEXT_BYTES", "1024")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + "x" * 300}) + "\n" for i in range(9)))

    assert [d[0] for d in texts._pool(TextSource(path=str(path)))] == ["0", "1", "2"]
    path.write_text(json.dumps({"text": "x" * 2000}))
    with pytest.raises(TextTooLong, match="more than 1024 bytes"):
        texts._pool(TextSource(path=str(path)))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'[{"text": "one"},\n {"text": "two"}]', ["one", "two"]),
        ("a.ndjson", b'{"text": "one"}\n{"text": "two"}', ["one", "two"]),
        ("a.csv", b'id,text\n1,"one, ""1""\nmore"\n2,2\n', ['one, "1"\nmore', "2"]),
        ("a.tsv", b"text\tid\none\t1\n", ["one"]),
        ("a.txt", b"one\r\n\ntwo\n", ["one", "two"]),
        ("a.jsonl.gz", gzip.compress(ROW, mtime=0), ["a text"]),
        ("a.jsonl.bz2", bz2.compress(ROW), ["a text"]),
        ("a.jsonl.xz", lzma.compress(ROW), ["a text"]),
        ("a.jsonl.zst", pyarrow.compress(ROW, "zstd", asbytes=True), ["a text"]),
    ],
)
def test_kinds(tmp_path, name, content, expected):
    """Files of all kinds that hold text are read, packed ones too."""
    (tmp_path / name).write_bytes(content)

    assert read(TextSource(dataset=str(tmp_path), data_file=name)) == expected


def test_a_splits_files_are_those_that_datasets_finds(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert read(TextSource(dataset=str(tmp_path), split="test")) == ["test"]
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: [test.jsonl, train.jsonl]\n---\n"
    )

    assert read(TextSource(dataset=str(tmp_path))) == ["test", "train"]
    with pytest.raises(TextError, match="no split 'test', only train"):
        read(TextSource(dataset=str(tmp_path), split="test"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\n1\n" + b'"' + b"x" * 99, None),
        ("a.json", b"[1]", "object 1 has no text in the field 'text'"),
        ("a.jsonl.gz", b"no gzip", "BadGzipFile"),
        ("a.xml", b"<a/>", r"the file a\.xml cannot be read as text: only \.json"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    """What is no such file is refused with its name, or read as far as it is one."""
    (tmp_path / name).write_bytes(content)
    source = TextSource(dataset=str(tmp_path), data_file=name)
    if message is None:
        assert read(source)
        return
    with pytest.raises(TextError, match=message):
        read(source)


def test_a_card_that_names_other_files_is_refused(tmp_path):
    (tmp_path / "secret.csv").write_text("secret_header\nsecret\n")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: ../secret.csv\n---\n"
    )

    with pytest.raises(InvalidInput, match=r"names the files '\.\./secret\.csv'") as caught:
        read(TextSource(dataset=str(folder)))
    assert "secret_header" not in str(caught.value)


def test_columns_are_told_printably_and_not_all_twenty_thousand(tmp_path):
    names = ["\x1b[31m\nINFO fake\x00", *map(str, range(20_000))]
    table = pyarrow.table({name: pyarrow.array([], pyarrow.string()) for name in names})
    pyarrow.parquet.write_table(table, tmp_path / "wide.parquet")

    with pytest.raises(TextError) as caught:
        read(TextSource(path=str(tmp_path / "wide.parquet")))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert "and 19991 more" in str(caught.value)


class FakeHub(BaseHTTPRequestHandler):
    """
    The data set ``org/name`` of a hub.

    Attributes:
        files: By name.
        elsewhere: Paths of requests that are not about it.
    """

    files: dict[str, bytes]
    elsewhere: list[str]

    def do_GET(self):
        commit = hashlib.sha1(repr(self.files).encode()).hexdigest()  # noqa: S324 - as git's
        path = self.path.partition("?")[0]
        file = path.removeprefix(f"/datasets/org/name/resolve/{commit}/")
        if path in (f"/api/datasets/org/name{r}" for r in ("", f"/revision/{commit}")):
            self._answer(200, json.dumps({"id": "org/name", "sha": commit}).encode())
        elif path.startswith(f"/api/datasets/org/name/tree/{commit}"):
            listed = [
                {"type": "file", "oid": "0" * 40, "size": len(content), "path": name}
                for name, content in self.files.items()
            ]
            self._answer(200, json.dumps(listed).encode())
        elif file in self.files:
            begin = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
            size = len(self.files[file])
            more = {
                "ETag": hashlib.sha1(self.files[file]).hexdigest(),  # noqa: S324 - as git's
                "X-Repo-Commit": commit, "Content-Range": f"bytes {begin}-{size - 1}/{size}",
            }  # fmt: skip
            self._answer(206 if begin else 200, self.files[file][begin:], more)
        else:
            self.elsewhere += (
                [] if "/org/name" in path or "/api/" in path or path == "/" else [path]
            )
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})

    do_HEAD = do_GET  # noqa: N815 - the name is the library's

    def _answer(self, status, content, more=None):
        self.send_response(status)
        for name, value in {**(more or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import datasets.config
    import huggingface_hub.constants

    handler = type("Hub", (FakeHub,), {"files": {}, "elsewhere": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
        monkeypatch.setattr(
            datasets.config,
            "HUB_DATASETS_URL",
            url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        )
        handler.url = url
        yield handler
        server.shutdown()
        thread.join()


def test_a_data_set_of_the_hub_is_read_at_one_commit_as_its_card_says(hub):
    card = b"---\nconfigs:\n- config_name: default\n  data_files: x*.gz\n---\n"
    hub.files = {"README.md": card, "x.jsonl.gz": gzip.compress(ROW, mtime=0), "b.jsonl": b"{}"}

    assert read(TextSource(dataset="org/name")) == ["a text"]
    elsewhere = f"{hub.url}/latest/meta-data/x.jsonl"
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {elsewhere}\n---\n"
    hub.files = {"README.md": card.encode(), "b.jsonl": ROW}
    with pytest.raises(InvalidInput, match=r"data set 'org/name': its README\.md names the files"):
        read(TextSource(dataset="org/name"))
    assert hub.elsewhere == []
