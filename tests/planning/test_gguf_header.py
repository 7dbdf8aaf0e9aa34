"""A GGUF file's header is parsed once for all that want it."""

import gguf
import numpy as np
import pytest

from pho_service.errors import ModelError
from pho_service.models.loading import load_model
from pho_service.planning.shapes import gguf_read_once


@pytest.fixture
def path(tmp_path):
    return written(
        tmp_path / "model.gguf",
        lambda writer: writer.add_name("small"),
        lambda writer: writer.add_token_list(["a", "bc", ""]),
        lambda writer: writer.add_token_scores([0.5, -1.0, 2.0]),
        lambda writer: writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3)),
    )


def written(path, *adds):
    writer = gguf.GGUFWriter(path, "llama")
    for add in adds:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_inside_the_second_reader_is_the_first_one_and_so_is_the_table_of_names(path):
    with gguf_read_once():
        assert gguf.GGUFReader(path) is gguf.GGUFReader(path)
        assert gguf.GGUFReader(path).get_field("general.name").contents() == "small"
        first = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is first


def test_fields_and_tensors_are_those_of_ggufs_own_reader_but_no_maps(path):
    theirs = gguf.GGUFReader(path)
    with gguf_read_once():
        ours = gguf.GGUFReader(path)

    assert list(ours.fields) == list(theirs.fields)
    for name, field in ours.fields.items():
        assert field.contents() == theirs.fields[name].contents()
    (tensor,) = ours.tensors
    assert type(tensor.data) is np.ndarray
    assert np.array_equal(tensor.data, theirs.tensors[0].data)


def test_afterwards_the_library_is_what_it_was_and_no_reader_is_kept(path):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(FileNotFoundError), gguf_read_once():
        gguf.GGUFReader(path.with_name("missing.gguf"))

    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    assert gguf.GGUFReader(path) is not gguf.GGUFReader(path)


def test_one_part_of_a_model_in_several_files_is_refused(tmp_path):
    path = written(tmp_path / "1.gguf", lambda writer: writer.add_uint16("split.count", 3))

    with pytest.raises(ModelError, match="one of 3 parts"):
        load_model(str(path), device="cpu")
