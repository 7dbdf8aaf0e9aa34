"""From one document to a model that runs: the way of docs/how-to/job-to-model.md."""

from pathlib import Path
from typing import Any

import torch
from fastapi.testclient import TestClient

import pho_service as pho
from pho_service.api.app import create_app
from pho_service.client import Client
from pho_service.host.settings import read_settings
from pho_service.pipeline.check import check_folder


def test_from_a_question_to_a_model(hand: Any, tmp_path: Path) -> None:
    """
    A document without a preset is searched by `best`; what is pulled is what the configuration
    says, is whole when it is packed, and writes the same text before and after.
    """
    roots = {"model_roots": (hand.folder,), "text_roots": (hand.folder,)}
    app = create_app(hand.store.database, read_settings(artifacts=str(hand.bundles), **roots))
    document = {
        "model": "model", "pattern": "0.5", "prune": True, "trials": 12,
        "calibration": {
            "text": "calibration.jsonl", "samples": 6, "context_length": 32, "rows_per_layer": 4,
            "projection_rows": 16, "kernel_sizes": [3, 5],
        },
        "confirm": {"text": "confirmation.jsonl", "candidates": 1, "windows": 3},
    }  # fmt: skip
    with TestClient(app, "http://127.0.0.1:8000/v1") as http, Client("http://x") as client:
        client._service._http = http
        job = client.submit(document)
        hand.until(hand.store.get(job.id), None)
        best = client.best(job.id)
        client.pull(job.id, tmp_path / "pruned")
    pho.pack(tmp_path / "pruned", tmp_path / "pruned.pho")
    dense = pho.load_model(str(hand.folder / "model"), device="cpu")
    before = pho.load_model(str(tmp_path / "pruned"), device="cpu")
    after = pho.load_packed(tmp_path / "pruned.pho", device="cpu")
    prompt = torch.arange(1, 9)[None]
    texts = [
        each.model.generate(prompt, max_new_tokens=8, do_sample=False).tolist()
        for each in (before, after)
    ]

    assert best.steps.update == "least-squares"
    assert best.perplexities is not None
    assert best.perplexities.pruned == best.confirmation.perplexity
    assert all(check.passed for check in check_folder(tmp_path / "pruned.pho", original=dense))
    assert len(texts[0][0]) > 8
    assert texts[0] == texts[1]
