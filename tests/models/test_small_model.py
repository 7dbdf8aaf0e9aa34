"""The small model that is trained on the spot, and its texts."""

import json

from pho_service.models.builtin import EXAMPLE, train_small_model, write_parts
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model


def test_the_same_steps_give_the_same_model(texts, tmp_path):
    source = TextSource(path=str(texts["calibration"]))
    trainings = [
        train_small_model(source, tmp_path / name, steps=30, context_length=16, seed=0)
        for name in ("one", "two")
    ]
    one, two = (load_model(str(training.folder)) for training in trainings)

    assert trainings[0].loss == trainings[1].loss < 5  # the log of its vocabulary is above
    assert one.weights_sha256 == two.weights_sha256


def test_it_has_the_shape_that_is_asked_for(texts, tmp_path):
    source = TextSource(path=str(texts["calibration"]))
    folder = tmp_path / "small"
    train_small_model(source, folder, steps=1, context_length=16, seed=0, shape=EXAMPLE)
    model = load_model(str(folder))

    shape = (EXAMPLE.hidden, EXAMPLE.intermediate)
    assert model.linears["model.layers.0.mlp.down_proj"].weight.shape == shape
    assert len(model.linears) == 7 * EXAMPLE.blocks


def test_of_texts_that_are_apart_none_has_a_paragraph_of_one_before(tmp_path):
    documents = {"a": "one\n\ntwo", "b": "two\n\nthree", "c": "one\n\nfive", "d": "two\n\nfour"}
    paths = write_parts(tmp_path, documents, apart=True)
    told = {part: path.read_text().splitlines() for part, path in paths.items()}

    assert {part: [json.loads(line)["text"] for line in each] for part, each in told.items()} == {
        "calibration": ["one\n\ntwo", "two\n\nfour"], "confirmation": ["three"], "report": ["five"],
    }  # fmt: skip
