"""A GGUF file's header is parsed once for all that want it."""

from pathlib import Path

import gguf
import pytest

from pho_service.models.gguf_header import gguf_read_once


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


def test_left_alone(path: Path) -> None:
    """Afterwards, also after an error, the library is what it was, and no reader is kept."""
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(FileNotFoundError), gguf_read_once():
        gguf.GGUFReader(path.with_name("missing.gguf"))

    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    assert gguf.GGUFReader(path) is not gguf.GGUFReader(path)
