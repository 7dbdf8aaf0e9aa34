"""The card of a pruned folder, and the folder on a hub that listens on this machine."""

import base64
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest
import yaml
from huggingface_hub import HfApi

from pho_service.errors import ConfigurationError, InvalidInput, ServiceError
from pho_service.models import saving
from pho_service.models.saving import licence_of, model_card, shareable

RECIPE = Path(__file__).parents[1] / "stored" / "0.1.0" / "pruning.json"


@pytest.fixture
def recipe():
    return json.loads(RECIPE.read_text())


def head(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_card(recipe):
    """It has base, method, numbers, text, perplexities, and how to load it."""
    recipe["model"]["name"] = "org/base"
    card = model_card(recipe, {"license": "apache-2.0"})

    assert head(card) == {
        "base_model": "org/base",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["pho", "pruned", "sparse", "sparsity-0.5"],
    }
    for said in (
        "50.00% of the weights of 14 linears", "Method: `ria-row, pattern 0.5, ", "row 1.000",
        "`text.txt`, 6 samples", "93 tokens of confirm.txt, in windows of 32",
        "| pruned | 71.18 | -9.2 ± 5.8% | 0.0% |", "| Wanda | 79.96 |", "from_pretrained",
        "`apache-2.0`",
    ):  # fmt: skip
        assert said in card
    found = {"dense": 80.0, "pruned": 100.0, "wanda": 120.5, "ria": None}
    recipe["configuration"]["perplexities"] = found  # measured on the same windows
    card = model_card(recipe, {})
    assert "| dense | 80.00 |  |\n| pruned | 100.0 | +25.0% |\n| Wanda | 120.5 | +50.6% |\n" in card
    assert "| RIA | none |" in card


def test_training_and_a_short_calibration_are_on_the_card(recipe):
    plain = model_card(recipe, {})
    assert "Training:" not in plain
    assert "Take care:" not in plain
    recipe["configuration"]["steps"] = {"reconstruction": {"method": "block"}}
    recipe["blocks"] = {
        "layers.0": {"before": 0.2, "after": 0.1, "passes": 2, "kept": True},
        "layers.1": {"before": 0.2, "after": 0.2, "passes": 3, "kept": False},
    }
    recipe["few_tokens"] = "The calibration has 16 tokens."
    card = model_card(recipe, {})

    for said in (
        "reconstruction block", "* Training: 1 of 2 blocks reconstructed, held-out "
        "error -50.0% on average; no better, so left as they were: layers.1\n",
        "* Take care: The calibration has 16 tokens.\n",
    ):  # fmt: skip
        assert said in card


def test_card_of_a_private_model(recipe):
    recipe["model"]["name"] = "/home/me/secret/base"
    recipe["configuration"]["confirmation"] = None
    for text in (recipe["calibration"]["text"], recipe["configuration"]["calibration"]["text"]):
        text["source"] = "/home/me/secret/text.txt"
    card = model_card(recipe, {})

    assert "secret" not in card
    assert "base_model" not in head(card)
    assert head(card)["license"] == "unknown"
    assert "see the base model" in card
    assert "not measured" in card
    assert "`text.txt`" in card


def test_it_is_that_of_the_bases_card_what_is_odd_there_is_left_out(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\n---\nx\n")
    found = licence_of(str(tmp_path), None)
    (tmp_path / "README.md").write_text("---\nlicense: [1, 2]\nlicense_link: 'a b'\n---\nx\n")

    assert found == {"license": "other", "license_name": "gemma"}
    assert licence_of(str(tmp_path), None) == {}
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert licence_of(str(tmp_path), None) == {}
    assert licence_of(str(tmp_path / "no.gguf"), None) == {}


def test_it_is_that_of_the_header_a_torn_file_says_nothing(tmp_path):
    path = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_license_link("https://example.org/licence")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a"] * 1000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = licence_of(str(path), None)
    path.write_bytes(path.read_bytes()[:60])

    assert found == {"license": "apache-2.0", "license_link": "https://example.org/licence"}
    assert licence_of(str(path), None) == {}


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload of small files takes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked = []
        self.token = "hf_right"  # noqa: S105 - of this test
        self.files = {}


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        lines = [json.loads(line) for line in self.rfile.read(length).splitlines()]
        path = self.path.partition("?")[0]
        self.server.asked.append((path, lines))
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._answer(200, {"url": f"{url}/org/pruned", "name": "org/pruned"})
        elif "/preupload/" in path:
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer(
                200, {"files": [{**regular, "path": f["path"]} for f in lines[0]["files"]]}
            )
        elif "/commit/" in path:
            for line in lines:
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            self._answer(200, {"commitUrl": f"{url}/org/pruned/commit/c", "commitOid": "c" * 40})
        else:
            self._answer(200, {})

    def do_GET(self):
        self._answer(404, {"error": "not found"})

    def _answer(self, status, document):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def listening(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(saving, "HfApi", partial(HfApi, endpoint=url))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pruned"
    (path / "pruning").mkdir(parents=True)
    (path / "pruning.json").write_bytes(RECIPE.read_bytes())
    (path / "pruning" / "masks.safetensors").write_bytes(b"masks")
    return path


def test_all_files_are_one_commit_in_a_private_repository(listening, folder):
    address = saving.push(folder, "org/pruned")

    assert address.endswith("/org/pruned/commit/c")
    (created,) = (lines[0] for path, lines in listening.asked if path == "/api/repos/create")
    assert created.get("visibility") == "private", created
    assert listening.files == {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*.*")
        if path.is_file()
    }


def test_nothing_local(listening, folder, tmp_path):
    """Where files lie on this machine is not told; what was used is, by its name."""
    (tmp_path / "texts").mkdir()
    recipe = json.loads((folder / "pruning.json").read_bytes())
    recipe["model"]["name"] = "/home/me/models/base.gguf"
    recipe["configuration"]["model"]["name"] = "org/name"
    recipe["calibration"]["text"]["source"] = "~/texts/c4.jsonl"
    recipe["origin"] = {"library": "C:\\Users\\me\\library", "reasons": ["of 1/2"], "parts": ["."]}
    before = json.dumps(recipe)
    (folder / "pruning.json").write_text(before)
    saving.push(folder, "org/pruned")
    pushed = json.loads(listening.files["pruning.json"])

    assert pushed["model"]["name"] == "base.gguf"
    assert pushed["configuration"]["model"]["name"] == "org/name"
    assert pushed["calibration"]["text"]["source"] == "c4.jsonl"
    assert pushed["origin"] == {"library": "library", "reasons": ["of 1/2"], "parts": ["."]}
    assert pushed["layers"] == recipe["layers"]
    assert (folder / "pruning.json").read_text() == before
    assert shareable({"a": [str(tmp_path / "texts"), 5, "org/name@x", ""]}) == {
        "a": ["texts", 5, "org/name@x", ""]
    }


def test_who_may_not_push_is_told_in_words(listening, folder, tmp_path):
    listening.token = "hf_other"  # noqa: S105 - of this test
    with pytest.raises(ServiceError, match="hf auth login"):
        saving.push(folder, "org/pruned")
    for name in ("pruned", "a/b/c", "org/what is this"):
        with pytest.raises(InvalidInput, match=name):
            saving.push(folder, name)
    with pytest.raises(ConfigurationError, match=r"has no pruning\.json"):
        saving.push(tmp_path, "org/pruned")
    listening.server_close()
    with pytest.raises(ServiceError, match="cannot be reached"):
        saving.push(folder, "org/pruned")
