"""Where the files of uploaded texts lie, in a folder and in an object store."""

import hashlib
import uuid
from pathlib import Path

import fsspec
import pytest

from pho_service.errors import ChangedInput, InvalidInput, OutputError, TextError
from pho_service.host.access import Access
from pho_service.host.artifacts import TextFiles

CONTENT = b"a few words"
ID = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}.txt"


@pytest.fixture(params=["folder", "bucket"])
def url(request, tmp_path):
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}"


def put(files):
    with files.receiving() as file:
        file.write(CONTENT)
        file.flush()
        files.put(Path(file.name), ID)


def access_to(files):
    return Access(model_roots=(), text_roots=(), hub_models=(), hub_datasets=(), texts=files)


def test_what_one_machine_puts_another_reads_until_it_is_removed(url, tmp_path):
    api, worker = TextFiles(url, tmp_path / "api"), TextFiles(url, tmp_path / "worker")
    put(api)
    place = access_to(worker).fetched_text(ID)
    content = Path(place).read_bytes()
    worker.remove(ID)

    assert content == CONTENT
    assert [*worker.folder.iterdir()] == [*api.folder.iterdir()] == []
    with pytest.raises(TextError, match=r"is not in the artifact store: .* Upload it again"):
        worker.fetch(ID)


def test_what_is_not_put_leaves_nothing(url, tmp_path):
    files = TextFiles(url, tmp_path)
    with files.receiving() as file:
        file.write(CONTENT)

    assert [*files.folder.iterdir()] == []


def test_a_file_of_a_bucket_that_is_not_what_its_name_says_is_not_read(tmp_path):
    url = f"memory://{uuid.uuid4().hex}"
    files = TextFiles(url, tmp_path)
    put(files)
    bucket, root = fsspec.core.url_to_fs(url)
    bucket.pipe_file(f"{root}/texts/{ID.removeprefix('sha256:')}", b"other words")

    with pytest.raises(ChangedInput, match="is not what its id says"):
        files.fetch(ID)
    assert [*files.folder.iterdir()] == []


@pytest.mark.parametrize("name", ["sha256:", "sha256:../../etc/passwd", f"{ID}x", ID.upper()])
def test_what_is_no_id_names_no_file(tmp_path, name):
    access = access_to(TextFiles(str(tmp_path), tmp_path))
    for find in (access.text, access.fetched_text):
        with pytest.raises(InvalidInput):
            find(name)


def test_documents_and_messages_name_a_text_by_its_id(tmp_path):
    access = access_to(TextFiles(str(tmp_path / "store"), tmp_path))
    place = access.text(ID)

    assert access.without_places({"text": {"source": place}}) == {"text": {"source": ID}}
    assert access.hide_places(f"{place} is empty", {}) == f"{ID} is empty"


def test_a_store_that_cannot_be_used_is_said_when_a_text_is_asked_for(tmp_path):
    files = TextFiles("nonsense://x", tmp_path)

    with pytest.raises(OutputError, match="PHO_ARTIFACTS='nonsense://x' cannot be used"):
        access_to(files).text(ID)
