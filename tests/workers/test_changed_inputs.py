"""Models, texts and bundles that change while a job works: never measured as if they had not."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from pho_service.errors import ChangedInput
from pho_service.models.loading import load_model
from pho_service.models.texts import apart
from pho_service.pipeline.rating import measure
from pho_service.spec.transfer import TransferRequest, TransferSpec
from storage.claims import LibraryAddition
from storage.records import JobState, LostClaim, StageKind

COMMITS = ("a" * 40, "b" * 40)


def double(folder, name="model.layers.0.mlp.down_proj.weight"):
    """Change a weight of a model, as somebody does who saves another one in its place."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name] = weights[name] * 2
    new = folder / "new"
    save_file(weights, new, metadata={"format": "pt"})
    new.replace(file)


def written_into(folder):
    """Double all weights in the file itself, as ``cp`` does: what is mapped changes at once."""
    file = folder / "model.safetensors"
    weights = {name: 2 * weight for name, weight in load_file(file).items()}
    changed = save(weights, metadata={"format": "pt"})
    assert len(changed) == file.stat().st_size
    with file.open("r+b") as opened:
        opened.write(changed)


def swap(folder, what="confirmation"):
    """Put the report text in the place of another, or another model in the place of the model."""
    if what == "model":
        double(folder / "model")
    else:
        shutil.copy(folder / "report.jsonl", folder / f"{what}.jsonl")


_source = []


@pytest.fixture
def source(hand, small):
    """A job that has succeeded, done once for all tests here."""
    if not _source:
        _source.append(hand.done(small()))
    return _source[0]


@pytest.mark.thorough
def test_text_changed_between_perplexities(hand, small, tmp_path):
    """A text that is replaced between two measurements fails the job; put back, it goes on."""
    _source.append(hand.done(small()))
    expected = _source[-1].best
    job = hand.until(hand.submit(small()), StageKind.PERPLEXITY)
    hand.step(job)
    kept = (hand.folder / "confirmation.jsonl").read_bytes()
    swap(hand.folder)

    with pytest.raises(ChangedInput, match=r"text confirmation\.jsonl.* has changed since") as told:
        hand.step(job)

    assert str(tmp_path) not in str(told.value)
    assert hand.store.get(job.id).state is JobState.FAILED

    (hand.folder / "confirmation.jsonl").write_bytes(kept)
    hand.store.ask(job.id, "resume")
    job = hand.until(job, None)

    assert {**job.best, "search": None} == {**expected, "search": None}


HELD_OUT = {"confirm": {"text": None}}  # windows that the calibration left
TWO_TEXTS = {"calibration": {"more_texts": ["confirmation.jsonl"]}, "confirm": {"text": None}}
BY_PERPLEXITY = {"objective": {"name": "perplexity"}}
RECOVERED = {"prune": True, "recovery": {"tokens": 640, "text": "confirmation.jsonl"}, **HELD_OUT}
REPORTED = {"report": {"text": "reported.jsonl"}}


@pytest.mark.parametrize("restarted", [True, pytest.param(False, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    ("changes", "kind", "what", "said"),
    [
        ({}, StageKind.CONFIRM, "model", r"the model \./model has changed since the job began"),
        ({}, StageKind.PERPLEXITY, "model", r"the model \./model has changed since the job began"),
        (HELD_OUT, StageKind.CONFIRM, "calibration", "calibration text"),
        (HELD_OUT, StageKind.PERPLEXITY, "calibration", "calibration text"),
        (TWO_TEXTS, StageKind.CONFIRM, "confirmation",
         r"calibration text confirmation\.jsonl has changed"),
        (TWO_TEXTS, StageKind.CONFIRM, "calibration",
         r"calibration text calibration\.jsonl has changed"),
        (BY_PERPLEXITY, StageKind.SEARCH, "model", "model"),
        (BY_PERPLEXITY, StageKind.SEARCH, "confirmation", "text"),
        (BY_PERPLEXITY, StageKind.FINISH, "confirmation", r"confirmation\.jsonl"),
        (RECOVERED, StageKind.PRUNE, "confirmation",
         r"confirmation\.jsonl, which the pruned model is recovered on, has changed"),
        (REPORTED, StageKind.PERPLEXITY, "reported", r"report text reported\.jsonl has changed"),
    ],
)  # fmt: skip
def test_what_is_replaced_after_the_calibration_is_neither_compared_nor_measured(
    hand, small, changes, kind, what, said, restarted
):
    hand.write_reported()
    job = hand.until(hand.submit(small(trials=6, **changes)), kind)
    swap(hand.folder, what)
    if restarted:
        hand.inputs = hand.new_inputs()

    with pytest.raises(ChangedInput, match=said):
        hand.step(job)


def test_a_perplexity_is_stored_with_the_hash_of_what_was_measured_not_of_what_should_have_been(
    hand, small, monkeypatch
):
    """So that whoever looks for mixtures finds them also if nothing refuses them."""
    monkeypatch.setattr("workers.inputs._compare", lambda *_: None)
    job = hand.until(hand.submit(small()), StageKind.PERPLEXITY)
    swap(hand.folder, "model")
    swap(hand.folder)
    hand.inputs = hand.new_inputs()
    hand.step(job)
    stages = hand.store.get(job.id).stages
    (began,) = (s.result["inputs"] for s in stages if s.kind is StageKind.CALIBRATE)
    (stored,) = (s.result for s in stages if s.kind is StageKind.PERPLEXITY and s.result)

    assert stored["weights_sha256"] != began["weights_sha256"]
    assert stored["text_sha256"] != began["confirmation"]


@pytest.mark.parametrize("stream", [True, False])
def test_model_changed_while_it_is_measured(hand, small, monkeypatch, stream):
    def measured(*args, **options):
        written_into(hand.folder / "model")
        return measure(*args, **options)

    job = hand.until(hand.submit(small(stream=stream)), StageKind.PERPLEXITY)
    monkeypatch.setattr("pho_service.pipeline.rating.measure", measured)

    with pytest.raises(ChangedInput):
        hand.step(job)

    assert all(s.result is None for s in hand.store.get(job.id).of_kind(StageKind.PERPLEXITY))


@pytest.mark.parametrize("what", ["model", "calibration", "version"])
def test_a_lost_bundle_is_not_replaced_by_one_of_other_inputs_or_of_another_version_of_a_package(
    hand, small, monkeypatch, what
):
    job = hand.until(hand.submit(small(confirm=None)), StageKind.SEARCH)
    shutil.rmtree(hand.bundles)
    hand.inputs = hand.new_inputs()
    said = {"calibration": "text", "version": "what is made now is another one"}.get(what, what)
    if what == "version":
        monkeypatch.setattr("pho_service.models.calibration.ALGORITHM", 999)
    else:
        swap(hand.folder, what)

    with pytest.raises(ChangedInput, match=said):
        hand.step(job)


def test_bundle_of_another_model(hand, small):
    """A bundle that lies under another one's name is not taken: the right one is made again."""
    expected = hand.done(small(confirm=None)).best
    (mine,) = hand.bundles.rglob("*.safetensors")
    other = small(calibration={"seed": 1}, confirm=None)
    hand.until(hand.submit(other), StageKind.SEARCH)
    (other,) = {*hand.bundles.rglob("*.safetensors")} - {mine}
    shutil.copy(other, mine)
    hand.inputs = hand.new_inputs()
    found = hand.done(small(confirm=None)).best

    assert {**found, "search": None} == {**expected, "search": None}


def test_calibrated_on_another_kind_of_device(hand, small):
    folder = hand.folder / "model"
    model = load_model(str(folder), device="cpu").model.to(torch.bfloat16)
    model.save_pretrained(folder)
    seal = hand.inputs.seal(small())
    as_on_a_gpu = small(dtype="bfloat16")

    assert hand.inputs.model(as_on_a_gpu, seal).dtype == torch.bfloat16
    double(folder)
    with pytest.raises(ChangedInput):
        hand.inputs.model(as_on_a_gpu, seal)


@pytest.fixture
def hub(hand, tmp_path, monkeypatch):
    """A copy of the hub's org/tiny with two commits; says which of them is main."""
    repository = tmp_path / "hub" / "models--org--tiny"
    for number, commit in enumerate(COMMITS):
        shutil.copytree(hand.folder / "model", repository / "snapshots" / commit)
        if number:
            double(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for constant, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)

    def main_is(number):
        (repository / "refs" / "main").write_text(COMMITS[number])

    main_is(0)
    return main_is


def test_hub_model_moves(hand, small, source, hub, monkeypatch):
    """
    A hub model without a revision is that of the commit which the first stage saw, and is loaded
    once by each worker.
    """
    loaded = []

    def load(name, **options):
        loaded.append(options["revision"])
        return load_model(name, **options)

    monkeypatch.setattr("workers.inputs.load_model", load)
    job = hand.until(hand.submit(small(model="org/tiny")), StageKind.CONFIRM)
    hub(1)
    hand.inputs = hand.new_inputs()
    job = hand.until(job, None)
    (calibrated,) = job.of_kind(StageKind.CALIBRATE)

    assert calibrated.result["inputs"]["revision"] == COMMITS[0]
    found, expected = (each.best["confirmation"] for each in (job, source))
    assert {**found, "text": None} == {**expected, "text": None}
    assert loaded == [None, COMMITS[0]]
    assert hand.inputs.model(small(model="org/tiny")).revision == COMMITS[1]


def test_local_model_is_not_asked_of_the_hub(hand, small, hub):
    del hub
    shutil.copytree(hand.folder / "model", hand.folder / "org" / "tiny")
    job = hand.until(hand.submit(small(model="org/tiny")), StageKind.PERPLEXITY)
    shutil.rmtree(hand.folder / "org")
    hand.inputs = hand.new_inputs()

    with pytest.raises(ChangedInput, match=r"org/tiny was a local one .* is no longer there"):
        hand.step(job)


@pytest.fixture
def transfer(source):
    """The document of a transfer to these models."""

    def build(*models, **changes):
        report = {"text": "confirmation.jsonl", "windows": 2}
        document = {"models": [*models], "report": report, **changes}
        request = TransferRequest.model_validate(document)
        return TransferSpec.of(request, str(source.id), source.best, source.spec)

    return build


def test_two_models_of_a_transfer_are_not_measured_on_two_texts(hand, transfer):
    shutil.copytree(hand.folder / "model", hand.folder / "other")
    job = hand.submit(transfer("./model", "./other"))
    hand.step(job)
    swap(hand.folder)
    job = hand.until(job, None)
    first, second = (stage.result or {} for stage in job.of_kind(StageKind.TRANSFER))

    assert first["perplexities"]
    assert second["error"]["type"] == "ChangedInput"
    assert "has changed since ./model was measured" in second["error"]["message"]


def test_model_changed_in_a_transfer(hand, transfer, monkeypatch):
    ensure = hand.inputs.bundles.ensure

    def changed(*args):
        bundle = ensure(*args)
        double(hand.folder / "model", "lm_head.weight")  # in no bundle
        return bundle

    spec = transfer("./model")
    hand.inputs = hand.new_inputs()
    ensure = hand.inputs.bundles.ensure
    monkeypatch.setattr(hand.inputs.bundles, "ensure", changed)
    job = hand.until(hand.submit(spec), None)
    (stage,) = job.of_kind(StageKind.TRANSFER)

    assert stage.result["error"]["type"] == "ChangedInput"


def test_claims_still_count(hand, transfer):
    """A stage that another worker has taken meanwhile stores nothing, whatever it compared."""
    job = hand.submit(transfer("./model"))
    claim = hand.take(job)
    lost = replace(claim, stage=replace(claim.stage, attempt=99))

    with pytest.raises(LostClaim):
        hand.store.complete(lost, {}, library=[LibraryAddition({}, {})], ended=True)


def test_confirmed_on_the_calibration_text(hand, small):
    spec = small(confirm={"text": "calibration.jsonl", "windows": 100})
    calibration = hand.inputs.calibration_text(spec).calibration
    windows = hand.inputs.confirmation_text(spec).windows

    assert len(windows) > 3
    assert torch.equal(apart(windows, calibration), windows)
