"""A GGUF file's header is parsed once for all that want it."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from pho_service.errors import ModelError
from pho_service.models.loading import load_model
from pho_service.planning.shapes import gguf_read_once


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A GGUF file with a name and nothing else."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_once(path: Path) -> None:
    """Inside, the second reader is the first one, and so is the table of names."""
    with gguf_read_once():
        assert gguf.GGUFReader(path) is gguf.GGUFReader(path)
        assert gguf.GGUFReader(path).get_field("general.name").contents() == "small"
        first = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is first


def test_same(tmp_path: Path) -> None:
    """Fields and tensors are those that gguf's own reader gives, but no maps of the file."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "bc", ""])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(path)
    with gguf_read_once():
        ours = gguf.GGUFReader(path)

    assert list(ours.fields) == list(theirs.fields)
    for name, field in ours.fields.items():
        assert field.contents() == theirs.fields[name].contents()
    (tensor,) = ours.tensors
    assert type(tensor.data) is np.ndarray
    assert np.array_equal(tensor.data, theirs.tensors[0].data)


def test_left_alone(path: Path) -> None:
    """Afterwards, also after an error, the library is what it was, and no reader is kept."""
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(FileNotFoundError), gguf_read_once():
        gguf.GGUFReader(path.with_name("missing.gguf"))

    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    assert gguf.GGUFReader(path) is not gguf.GGUFReader(path)


def test_parts(tmp_path: Path) -> None:
    """One part of a model in several files is refused: the others would not be read."""
    path = tmp_path / "model-00001-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(ModelError, match="one of 3 parts"):
        load_model(str(path), device="cpu")
