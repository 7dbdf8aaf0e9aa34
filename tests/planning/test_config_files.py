"""Where configurations come from: folders, GGUF headers, a stand-in of the hub; and odd ones."""

import json
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import gguf
import pytest

from pho_service.errors import ModelError
from pho_service.models.builtin import smollm2
from pho_service.planning.config_files import MOST_BYTES, read_config
from pho_service.planning.shapes import model_shapes

CONFIG = {"model_type": "llama", "hidden_size": 64}


class Hub(BaseHTTPRequestHandler):
    """Serves one configuration, to who has the token."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        """The file, or why not."""
        self.asked.append(self.path)
        if "private" in self.path and self.headers.get("authorization") != "Bearer right":
            self.send_response(401)
            self.end_headers()
            return
        self.send_response(500 if "broken" in self.path else 200)
        self.end_headers()
        self.wfile.write(json.dumps(CONFIG).encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A stand-in of the hub, which HF_ENDPOINT names."""
    Hub.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        yield Hub
        server.shutdown()


def test_folder(tmp_path: Path) -> None:
    """Of a folder config.json is read; no weights need be there."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    assert read_config(str(tmp_path)) == CONFIG


def test_gguf() -> None:
    """SmolLM2's header gives the shapes of its weights, tied embeddings included."""
    shapes = model_shapes("smollm2", read_config(str(smollm2())))

    assert shapes.parameters == pytest.approx(134_515_008, rel=0.005)
    assert shapes.prunable == 106_168_320
    assert len(shapes.blocks) == 30
    assert shapes.vocabulary == 49152


def test_gguf_of_experts(tmp_path: Path) -> None:
    """A mixture is told by its number of experts."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    config = read_config(str(path))

    assert config["model_type"] == "mixtral"
    assert config["vocab_size"] == 3
    assert model_shapes("m", config).blocks[0][-1].count == 4


def test_hub(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """One file is asked for, in the revision that is named, with the user's token."""
    assert read_config("org/name") == CONFIG
    assert read_config("org/name", revision="v2") == CONFIG
    monkeypatch.setenv("HF_TOKEN", "right")
    assert read_config("org/private") == CONFIG
    assert hub.asked[:2] == [
        "/org/name/resolve/main/config.json", "/org/name/resolve/v2/config.json",
    ]  # fmt: skip


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "words"), [("org/private", "private or gated"), ("org/broken", "answered 500")]
)
def test_hub_says_no(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub says is said in words."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ModelError, match=words):
        read_config(name)


def test_hub_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that does not answer is named, with the way out."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="the Hugging Face hub cannot be reached"):
        read_config("org/name")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b" " * (MOST_BYTES + 1), "has more than"),
    ],
)
def test_odd_files(content: bytes, words: str, tmp_path: Path) -> None:
    """A config.json that is none is named."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        read_config(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "is not a whole GGUF file"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "a text of 1152921504606846976 bytes"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 2**60),
            "GGUF",
        ),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 77), "kind 77"),
    ],
)
def test_odd_headers(content: bytes, words: str, tmp_path: Path) -> None:
    """A header that declares more than it has, or what is not known, ends at once in words."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        read_config(str(path))


def test_missing(tmp_path: Path) -> None:
    """A path that is not there is never asked of the hub; messages have the name alone."""
    with pytest.raises(ModelError, match=r"\./m does not exist on this machine"):
        read_config("./m")
    with pytest.raises(ModelError) as found:
        read_config("m", path=str(tmp_path))
    assert str(tmp_path) not in str(found.value)
