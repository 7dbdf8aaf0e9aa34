"""
Readers of files, on whatever a file may hold: they give what is valid, or say what is wrong.

`make fuzz` runs the same with many more examples; see benchmarks/fuzz.py.
"""

import json
import resource
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pho_service.errors import InvalidInput, PhoError
from pho_service.library import read_library_file
from pho_service.models import bundle_file, mask_file
from pho_service.models.bundle_file import read_bundle, write_bundle
from pho_service.models.loading import load_model
from pho_service.models.mask_file import LayerMask, read_masks, write_masks
from pho_service.models.saving import read_recipe
from pho_service.planning.costs import CARDS
from pho_service.planning.plan import plan_job
from pho_service.planning.shapes import gguf_read_once, read_shapes
from pho_service.pruning.bundle import LayerSample, ProxyBundle
from pho_service.pruning.statistics import InputStatistics
from pho_service.spec.configuration import Configuration, read_configuration, write_configuration
from pho_service.spec.job import JobSpec
from pho_service.spec.pattern import Coefficients
from pho_service.spec.transfer import TransferRequest

MEMORY_BYTES = 256 * 2**20  # that all examples together may take beside what the tests have
PROFILE = "fuzz" if settings.get_current_profile_name() == "fuzz" else "suite"
fuzzed = settings(
    settings.get_profile(PROFILE), suppress_health_check=[HealthCheck.function_scoped_fixture]
)

_RAW = [
    "1e999", "-1e999", "NaN", "-Infinity", "1" * 5000, "-0", "1e-400", "0.1e1", "2" * 300,
    "[" * 90 + "]" * 90, "[" * 5000 + "]" * 5000, '{"a":' * 300 + "1" + "}" * 300,
    '"\\ud800"', '"\\u0000"', '"' + "x" * 5000 + '"', '1, "version": 1, "layers": []', "", "tru",
]  # fmt: skip
_values = st.one_of(
    st.sampled_from(_RAW),
    st.one_of(
        st.none(), st.booleans(), st.floats(), st.text(max_size=5),
        st.integers(-3, 70) | st.sampled_from([2**31, 2**53, 2**63, 2**64, 10**300]),
        st.sampled_from([[], {}, [[]], [1, 2], {"a": 1}, [None], "2:4", "0.5", "F32", "U8"]),
    ).map(json.dumps),
)  # fmt: skip


def _places(value):
    if isinstance(value, (dict, list)):
        for key in [*value] if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@st.composite
def mutated_json(draw, document):
    """A document with some values exchanged, taken out, or given twice."""
    changed = json.loads(json.dumps(document))
    raw = {}
    for number in range(draw(st.integers(1, 3))):
        places = list(_places(changed))
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 5)) == 0:
            del container[key]
        else:
            container[key] = f"raw {number}"
            raw[json.dumps(container[key])] = draw(_values)
    text = json.dumps(changed)
    for placeholder, value in raw.items():
        text = text.replace(placeholder, value)
    return text


@st.composite
def mutated_bytes(draw, content):
    """A file with bytes flipped, cut off, put in twice, taken out, or made to large numbers."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)) | st.integers(0, 300))
        part = draw(
            st.binary(min_size=1, max_size=8)
            | st.sampled_from([struct.pack("<Q", n) for n in (0, 2**31, 2**40, 2**63, 2**64 - 1)])
        )
        what = draw(st.sampled_from(["write", "insert", "remove", "repeat", "cut"]))
        if what == "write":
            changed[at : at + len(part)] = part
        elif what == "insert":
            changed[at:at] = part
        elif what == "remove":
            del changed[at : at + len(part)]
        elif what == "repeat":
            changed[at:at] = changed[at : at + 64]
        else:
            del changed[at:]
    return bytes(changed)


class Format(NamedTuple):
    """A kind of file: its name, one that is read, what reads it, and what is made of it."""

    name: str
    read: Callable[[Path], object]
    valid: bytes
    mutants: st.SearchStrategy[bytes]


CONFIGURATION = Configuration(
    method="crepe",
    coefficients=Coefficients(
        row=0.2, column=0.5, neighbourhood=0.3, kernel_size=9, activation_exponent=0.3
    ),
    pattern="2:4",
    scope="row",
    objective={"name": "activation-reconstruction/blend", "value": 0.01},
    finalists=[{"method": "crepe", "trial": 7, "proxy": 0.01, "perplexity": 17.0}],
    baselines=[{"method": "wanda", "trial": 0}],
    search={"trials": 40, "space": {"row_share": [0, 1]}},
    model={"name": "org/name", "weights_sha256": "ab"},
    versions={"torch": "2.7"},
).model_dump(mode="json")
TRANSFER = {
    "format": "pho-transfer",
    "version": 1,
    "source": "s",
    "configuration": CONFIGURATION,
    "targets": [
        {"target": "t", "model": {"name": "m"}, "perplexities": {"ria": 9.5, "found": 9.0},
         "proxies": {"ria": 0.5, "found": None}, "own": CONFIGURATION}
    ],
}  # fmt: skip
RECIPE = {
    "format": "pho-pruning",
    "version": 2,
    "configuration": {"pattern": "2:4"},
    "model": {"name": "m", "revision": None, "weights_sha256": "ab", "dtype": "float32"},
    "updated": False,
    "folded": [{"reader": "a", "writers": ["b"], "order": [1, 0]}],
    "sparsity": 0.5,
    "layers": {
        name: {"sparsity": 0.5, "mask_sha256": "a", "weights_sha256": "b", "keep": 2, "group": 4}
        for name in "ab"
    },
    "calibration": {"seed": 0},
    "versions": {"torch": "2.7"},
}
PLANNED = {
    f"model.layers.{name}.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 64]}
    for name, shape in {
        "0.self_attn.q_proj": [4, 8], "0.norm": [8], "1.mlp.experts.0.up_proj": [4, 8],
        "1.mlp.experts.1.up_proj": [4, 8], "1.mlp.gate": [2, 8],
        "1.mlp.experts.down_proj": [2, 8, 4],
    }.items()
}  # fmt: skip
JOB = {
    "model": "org/name", "pattern": "0.5", "scope": "layer", "name": "n", "seed": 1, "trials": 40,
    "calibration": {"dataset": "org/d", "samples": 8, "kernel_sizes": [3, 5]},
    "confirm": {"finalists": 3, "windows": 4}, "search_space": {"row_share": [0, 1]},
    "objective": {"weighting": "fisher"}, "steps": {"allocation": {"method": "owl"}},
    "warm_start": {"count": 2, "found": [{"coefficients": CONFIGURATION["coefficients"]}]},
}  # fmt: skip
REQUEST = {
    "models": ["org/a", "b"], "report": {"text": "t.txt", "windows": 3},
    "search": {"trials": 40, "confirm": {"windows": 2}}, "calibration": {"samples": 4},
}  # fmt: skip


def _bundle():
    layers = [
        LayerSample(
            name=f"blocks.{i}.up", out_features=6, input_index=0, row_index=torch.tensor([0, 4]),
            rows=torch.ones(2, 4), row_mean=torch.ones(2), column_mean=torch.ones(4),
            window_means={3: torch.ones(2, 4)}, fisher=torch.ones(6), output_energy=1.5,
        )
        for i in range(2)
    ]  # fmt: skip
    inputs = [InputStatistics(activation_norm=torch.ones(4), root=torch.ones(3, 4))]
    return ProxyBundle(layers=layers, inputs=inputs, provenance={"model": {"name": "m"}})


def _written(write, folder):
    path = folder / "valid"
    write(path)
    return path.read_bytes()


@st.composite
def mutated_tensors(draw, content, key):
    """A safetensors file with a change in its header, or in the document of its metadata."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    if draw(st.booleans()):
        document = json.loads(header["__metadata__"][key])
        header["__metadata__"][key] = draw(mutated_json(document))
        text = json.dumps(header)
    else:
        text = draw(mutated_json(header))
    return struct.pack("<Q", len(text)) + text.encode() + content[end:]


def _read_bundle(path):
    bundle = read_bundle(path)
    assert bundle.weights > 0
    assert bundle.kernel_sizes
    bundle.statistics()


def _read_masks(path):
    masks = read_masks(path)
    for name in masks.names:
        assert masks.mask(name).keep.shape == masks.shapes[name]
        masks.sha256(name)


def _read_configuration(path):
    found = read_configuration(path)
    found.candidate()
    write_configuration(found, path.with_suffix(".again"))
    assert read_configuration(path.with_suffix(".again")) == found


def _read_library_file(path):
    found = read_library_file(path)
    json.dumps(found.to_dict("source"), allow_nan=False, ensure_ascii=False).encode()


def _read_gguf(path):
    """What goes wrong here is a ModelError when a model is loaded: see loading.py."""
    with gguf_read_once(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gguf.GGUFReader(path)
        except MemoryError:
            raise
        except Exception as error:
            raise PhoError(str(path)) from error


def _read_plan(path):
    source = path if path.suffix == ".gguf" else path.parent
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    spec = JobSpec.model_validate({"model": "m", "pattern": "0.5", "stream": True})
    try:
        plan_job(spec, read_shapes(str(path), path=str(source)), CARDS["H100"])
    except InvalidInput as error:  # which knows the model's name
        raise InvalidInput(f"{path}: {error}") from error


def _gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 0.25, 0.125])
    writer.add_tensor("output.weight", torch.ones(4, 8).numpy())
    writer.add_tensor("blk.0.ffn_up_exps.weight", torch.ones(2, 4, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _masks(path):
    masks = {
        "blocks.1.up": LayerMask(keep=torch.ones(3, 4) > 0, order=torch.tensor([1, 0, 3, 2])),
        "blocks.0.up": LayerMask(keep=torch.eye(5) > 0),
    }
    write_masks(masks, path, metadata={"model": {"name": "tiny"}})


def _json(document):
    content = json.dumps(document).encode()
    odd = mutated_json(document).map(lambda text: text.encode(errors="surrogatepass"))
    return content, odd | mutated_bytes(content) | st.binary(max_size=300)


def _tensors(content, key):
    odd = mutated_tensors(content, key) | mutated_bytes(content) | st.binary(max_size=300)
    return content, odd


def _header(document):
    """A file of weights that is a header alone."""
    content = header_of(document)
    odd = mutated_json(document).map(lambda text: text.encode(errors="surrogatepass"))
    odd = odd.map(lambda text: struct.pack("<Q", len(text)) + text)
    return content, odd | mutated_bytes(content) | st.binary(max_size=300)


def _formats(folder):
    gguf_file = _written(_gguf, folder)
    kinds = {
        "configuration": ("c.json", _read_configuration, _json(CONFIGURATION)),
        "transfer": ("t.json", _read_library_file, _json(TRANSFER)),
        "library": ("l.json", _read_library_file, _json(CONFIGURATION)),
        "recipe": ("pruning.json", lambda path: read_recipe(path.parent), _json(RECIPE)),
        "bundle": ("b.safetensors", _read_bundle,
                   _tensors(_written(lambda p: write_bundle(_bundle(), p), folder),
                            bundle_file.FORMAT)),
        "masks": ("m.safetensors", _read_masks, _tensors(_written(_masks, folder),
                                                         mask_file.MASK_FORMAT)),
        "gguf": ("m.gguf", _read_gguf, (gguf_file, mutated_bytes(gguf_file))),
        "plan": ("model.safetensors", _read_plan, _header(PLANNED)),
        "plan of gguf": ("m.gguf", _read_plan, (gguf_file, mutated_bytes(gguf_file))),
    }  # fmt: skip
    return {kind: Format(name, read, *rest) for kind, (name, read, rest) in kinds.items()}


KINDS = (
    "configuration", "transfer", "library", "recipe", "bundle", "masks", "gguf", "plan",
    "plan of gguf",
)  # fmt: skip


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return _formats(tmp_path_factory.mktemp("valid"))


@pytest.mark.parametrize("kind", KINDS)
def test_valid(formats, kind, tmp_path):
    """What the others are made of is read."""
    path = tmp_path / formats[kind].name
    path.write_bytes(formats[kind].valid)

    formats[kind].read(path)


@pytest.mark.parametrize("kind", KINDS)
@fuzzed
@given(data=st.data())
def test_file(formats, kind, tmp_path, data):
    """A file of any content is read, or refused with its name, in little memory."""
    path = tmp_path / formats[kind].name
    path.write_bytes(data.draw(formats[kind].mutants))
    before = _peak_bytes()
    try:
        formats[kind].read(path)
    except PhoError as error:
        message = str(error)
        assert path.name in message or str(path.parent) in message
        assert len(message) < 5000
        message.encode()  # it can be printed, and stored

    assert _peak_bytes() - before < MEMORY_BYTES


def _peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    ("model", "document"), [(JobSpec, JOB), (TransferRequest, REQUEST)], ids=["job", "transfer"]
)
@fuzzed
@given(data=st.data())
def test_a_job_document_of_any_content_is_refused_by_its_fields_or_can_be_stored_and_is_the_same(
    model, document, data
):
    text = data.draw(mutated_json(document))
    try:
        found = model.model_validate(json.loads(text))
    except (ValidationError, ValueError, RecursionError):
        return
    stored = json.dumps(found.model_dump(), allow_nan=False, ensure_ascii=False)

    assert b"\\u0000" not in json.dumps(found.model_dump()).encode()
    stored.encode()
    assert model.model_validate(json.loads(stored)) == found


def header_of(tensors):
    """A safetensors file that has a header alone."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def gguf_header(*parts):
    """The beginning of a GGUF file without tensors, with one entry ``a``."""
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    return start + struct.pack("<Q", 1) + b"a" + b"".join(parts)


TERABYTES = {"x": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}
HOSTILE = {
    "header": ("b.safetensors", struct.pack("<Q", 2**62)),
    "tensors": ("b.safetensors", header_of(TERABYTES)),
    "masks": ("m.safetensors", header_of(TERABYTES)),
    "sparse": ("b.safetensors", header_of(TERABYTES)),
    "string": ("m.gguf", gguf_header(struct.pack("<IQ", 8, 2**62))),
    "array": ("m.gguf", gguf_header(struct.pack("<IIQ", 9, 0, 2**62))),
    "array of strings": ("m.gguf", gguf_header(struct.pack("<IIQ", 9, 8, 2**62))),
    "long array": ("m.gguf", gguf_header(struct.pack("<IIQ", 9, 0, 2**23), bytes(2**23))),
    "entries": ("m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62)),
    "descriptions": ("m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0)),
    "lists": ("c.json", b"[" * 2**21),
    "recipe": ("pruning.json", b"[" + b"[]," * 2**20 + b"[]]"),
    "faults": ("c.json", json.dumps({**CONFIGURATION, "finalists": [1] * 300_000}).encode()),
}  # fmt: skip


READERS = {
    "b.safetensors": read_bundle, "m.safetensors": read_masks, "c.json": read_configuration,
    "pruning.json": lambda path: read_recipe(path.parent),
    "m.gguf": lambda path: load_model(str(path), device="cpu"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of gguf's reader
@pytest.mark.parametrize("name", HOSTILE)
def test_declared_terabytes_and_very_many_faults_take_little_memory(name, tmp_path):
    file, content = HOSTILE[name]
    with (tmp_path / file).open("wb") as written:
        written.write(content)
        if name == "sparse":
            written.truncate(written.tell() + 2**42)
    before = _peak_bytes()
    with pytest.raises(PhoError) as raised:
        READERS[file](tmp_path / file)

    assert len(str(raised.value)) < 5000
    assert _peak_bytes() - before < MEMORY_BYTES


def test_what_safetensors_quotes_of_a_header_is_told_in_part(tmp_path):
    path = tmp_path / "b.safetensors"
    path.write_bytes(header_of({"__metadata__": "x" * 1_000_000}))
    for reader in (read_bundle, read_masks):
        with pytest.raises(PhoError, match=r"b\.safetensors is damaged") as raised:
            reader(path)

        assert len(str(raised.value)) < 1000
