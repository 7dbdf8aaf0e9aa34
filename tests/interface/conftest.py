"""A model in memory, its tokenizer, and texts as strings."""

import copy
import json

import pytest
import torch
from transformers import AutoTokenizer

import pho_service as pho
from pho_service.spec.configuration import Configuration
from pho_service.spec.steps import Steps

SMALL = {"samples": 6, "context_length": 32, "rows_per_layer": 4, "kernel_sizes": (3, 5)}


@pytest.fixture
def sentences(texts):
    """The documents of ``texts``, in memory."""
    return {
        name: [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for name, path in texts.items()
    }


@pytest.fixture
def tokenizer(model_folder):
    """That of ``tiny_llama``."""
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def shared_bundle(new_llama, texts_of_all):
    """Of a model that is as ``tiny_llama``."""
    tokenizer = AutoTokenizer.from_pretrained(texts_of_all["tokenizer"])
    return pho.calibrate(new_llama(), tokenizer, texts_of_all["calibration"], **SMALL)


@pytest.fixture
def bundle(shared_bundle):
    """Of ``tiny_llama``."""
    return copy.deepcopy(shared_bundle)


@pytest.fixture
def weights(tiny_llama):
    """Whether ``tiny_llama`` still has the weights that it began with."""
    before = copy.deepcopy(tiny_llama.state_dict())

    def same():
        now = tiny_llama.state_dict()
        return all(torch.equal(now[name], tensor) for name, tensor in before.items())

    return same


@pytest.fixture
def with_steps():
    """A configuration at 50 %, with these steps beside the score."""
    score = {
        "row": 0.3, "column": 0.3, "neighbourhood": 0.4, "kernel_size": 3,
        "activation_exponent": 0.6,
    }  # fmt: skip
    document = {"method": "crepe", "coefficients": score, "pattern": "0.5", "scope": "layer"}
    return lambda steps: Configuration.model_validate({**document, "steps": steps.to_dict()})


@pytest.fixture
def configuration(with_steps):
    """A configuration at 50 %, the score alone."""
    return with_steps(Steps())
