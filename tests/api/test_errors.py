"""What a caller does wrong: each wrong value at its place, and every answer a problem."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pho_service.spec.fields import CalibrationSpec
from pho_service.spec.job import JobSpec
from pho_service.spec.objective import SAMPLERS

Refusal = Callable[..., dict[str, Any]]

DOCUMENT = {"model": "org/name", "pattern": "0.5"}
JSON = {"Content-Type": "application/json"}


def put(pointer: str, value: Any) -> dict[str, Any]:
    """A small document with one value changed."""
    document: dict[str, Any] = dict(DOCUMENT)
    *folders, last = pointer.strip("/").split("/")
    place = document
    for folder in folders:
        place = place.setdefault(folder, {})
    place[last] = value
    return document


@pytest.fixture(scope="module")
def client(shared_client: TestClient) -> TestClient:
    """What is refused leaves nothing behind."""
    return shared_client


# ------------------------------------------------------------------------ wrong fields


@pytest.fixture
def rejected(client: TestClient, refusal: Refusal) -> Callable[[Any], list[dict[str, Any]]]:
    """Submit what must be refused; gives the errors."""

    def ask(document: Any) -> list[dict[str, Any]]:
        before = client.get("/v1/jobs").json()
        answer = client.post("/v1/jobs", content=json.dumps(document), headers=JSON)
        problem = refusal(answer, 422, "invalid_request")
        assert client.get("/v1/jobs").json() == before
        errors = problem["errors"]
        assert isinstance(errors, list)
        return errors

    return ask


WRONG = [
    ("/model", 5, "string"),
    ("/model", "x" * 513, "512"),
    ("/model", "a\x00b", "control characters"),
    ("/model", "../../etc", "does not lie below"),
    ("/model", "/etc/passwd", "does not lie below"),
    ("/model", "~/model", "does not lie below"),
    ("/model", "file:///etc/passwd", "does not exist"),
    ("/model", "a" * 300 + ".gguf", "does not lie below"),
    ("/model", "org/" + "a" * 300, ""),
    ("/calibration/text", "a" * 300, "does not lie below"),
    ("/pattern", "half", "neither a number nor N:M"),
    ("/pattern", "1" * 512, ""),
    ("/pattern", "9" * 500 + ":4", ""),
    ("/name", "x" * 101, "100"),
    ("/name", "a\nb", "control characters"),
    ("/sampler", "luck", f"{next(iter(SAMPLERS))!r}, "),
    ("/trials", 3, "baselines"),
    ("/trials", 10001, "10000"),
    ("/trials", 10**400, ""),
    ("/trials", 1e3, "integer"),
    ("/trials", "200", "integer"),
    ("/trials", True, "integer"),
    ("/seed", 2**32, "4294967296"),
    ("/priority", 101, "100"),
    ("/priority", -101, "-100"),
    ("/timeout_s", float("nan"), "finite"),
    ("/timeout_s", 1e300, "10000000"),
    ("/max_attempts", 21, "20"),
    ("/calibration", [], "dictionary"),
    ("/calibration/text", "/etc/passwd", "does not lie below"),
    ("/calibration/text", "nowhere.txt", "does not exist"),
    ("/calibration/samples", 2**70, "100000"),
    ("/calibration/kernel_sizes", "3,5", "list"),
    ("/calibration/data_file", "a.parquet", "no dataset is given"),
    ("/confirm/text", "nowhere.txt", "does not exist"),
    ("/search_space/row_share", [0.8, 0.2], "low <= high"),
    ("/search_space/gradient_exponent", [float("nan"), 1], "finite"),
]


@pytest.mark.parametrize(("pointer", "value", "says"), WRONG)
def test_each_wrong_value_is_refused_at_its_own_json_pointer_with_the_rule(
    rejected: Callable[[Any], list[dict[str, Any]]], pointer: str, value: Any, says: str
) -> None:
    (error,) = rejected(put(pointer, value))

    # An item of a list is named more exactly than the list.
    assert error["pointer"].startswith(pointer)
    assert says in error["detail"]
    assert "parameter" not in error


@pytest.mark.parametrize(
    ("document", "pointer", "says"),
    [
        ({"model": "org/name"}, "/pattern", "there is none: give pattern"),
        ({"pattern": "0.5"}, "/model", "required"),
        ({**DOCUMENT, "pattern": "2:4", "scope": "layer"}, "/scope", "no meaning"),
        (
            {**DOCUMENT, "calibration": {"text": "a", "dataset": "b"}},
            "/calibration/dataset",
            "text and dataset are both given",
        ),
        (
            {**DOCUMENT, "calibration": {"dataset": "org/d", "data_file": "../x"}},
            "/calibration/data_file",
            "not a path inside of the data set",
        ),
        (
            {**DOCUMENT, "search_space": {"kernel_sizes": [7]}},
            "/search_space",
            "7, which is not in calibration.kernel_sizes: 3, 5, 9, 15",
        ),
        (
            {**DOCUMENT, "confirm": None, "objective": {"name": "perplexity"}},
            "/objective",
            "confirm must not be null",
        ),
        (
            {**DOCUMENT, "calibration": {"kernel_sizes": [3, 5, 1001]}},
            "/calibration/kernel_sizes/2",
            "999",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused_at_the_one_that_comes_later(
    rejected: Callable[[Any], list[dict[str, Any]]],
    document: dict[str, Any],
    pointer: str,
    says: str,
) -> None:
    (error,) = rejected(document)

    assert error["pointer"] == pointer
    assert says in error["detail"]


def test_all_at_once(rejected: Callable[[Any], list[dict[str, Any]]]) -> None:
    """All wrong values of a document are named in one answer."""
    errors = rejected(
        {"pattern": "half", "trials": "many", "calibration": {"samples": 0, "bos": 1}, "x": 1}
    )

    assert {e["pointer"] for e in errors} == {
        "/model", "/pattern", "/trials", "/calibration/samples", "/calibration/bos", "/x",
    }  # fmt: skip


def test_detail_counts(client: TestClient) -> None:
    """The sentence for people names the first wrong value and how many more there are."""
    detail = client.post("/v1/jobs", json={"model": "", "pattern": "x", "seed": -1}).json()[
        "detail"
    ]

    assert detail.startswith("/model: ")
    assert detail.endswith("(and 2 more)")


def test_very_many(client: TestClient, refusal: Refusal) -> None:
    """Of thousands of wrong values a hundred are named, and all are counted."""
    document = {**DOCUMENT, **{f"field {number}": 1 for number in range(3000)}}
    problem = refusal(client.post("/v1/jobs", json=document), 422, "invalid_request")

    assert len(problem["errors"]) == 100
    assert problem["detail"].endswith("(and 2999 more)")


@pytest.mark.parametrize(
    ("pointer", "known"),
    [
        ("/trails", list(JobSpec.model_fields)),
        ("/calibration/sample", list(CalibrationSpec.model_fields)),
        ("/confirm/window", ["text", "candidates", "windows"]),
        ("/objective/kind", ["name", "weighting"]),
        ("/search_space/row", ["neighbourhood_share", "row_share"]),
    ],
)
def test_an_unknown_field_is_refused_with_the_fields_that_are_known_there(
    rejected: Callable[[Any], list[dict[str, Any]]], pointer: str, known: list[str]
) -> None:
    (error,) = rejected(put(pointer, 1))

    assert error["pointer"] == pointer
    assert error["detail"].startswith(f"unknown field; known are {', '.join(known)}")


@pytest.mark.parametrize(
    ("name", "pointer"),
    [
        ("a/b", "/a~1b"),
        ("a~b", "/a~0b"),
        ("~1", "/~01"),
        ("", "/"),
        ("\x00", "/\x00"),
        ("é\u2028🙂", "/é\u2028🙂"),
        ("x" * 30_000, "/" + "x" * 30_000),
    ],
)
def test_odd_field_name(
    rejected: Callable[[Any], list[dict[str, Any]]], name: str, pointer: str
) -> None:
    """The pointer to a field with an odd name is escaped as RFC 6901 has it."""
    (error,) = rejected({**DOCUMENT, name: 1})

    assert error["pointer"] == pointer


@pytest.mark.parametrize("pointer", ["/x\ud800", "/model", "/name", "/calibration/text"])
def test_half_characters(client: TestClient, refusal: Refusal, pointer: str) -> None:
    """A surrogate without its other half is refused wherever it stands."""
    document = put(pointer, "a\udfff")  # json.dumps writes \udfff, which is valid JSON
    problem = refusal(client.post("/v1/jobs", content=json.dumps(document), headers=JSON), 422)

    assert len(problem["errors"]) == 1


# ------------------------------------------------------------------------- odd bodies


@pytest.mark.parametrize(
    "bodies",
    [
        pytest.param((b"", b"{", b"{}}", b"nope", b'{"a": }', b"{'a': 1}", b'{"a": 1,}', b"-",
                      b"\x00", b'"' + b"x" * 60_000), id="no JSON"),
        pytest.param((b"\xff\xfe", b'{"model": "\xff"}', b"\xed\xa0\x80"), id="no UTF-8"),
        pytest.param((b"[" * 60_000, b'{"a":' * 10_000), id="too deep"),
        pytest.param((b"1" * 60_000, b'{"trials": ' + b"1" * 5_000 + b"}"), id="too long a number"),
        pytest.param((b"null", b"[]", b'"text"', b"5", b"true", b"[[]]", b"NaN", b"1e999",
                      b'[{"model": "a", "pattern": "0.5"}]'), id="not a JSON object"),
    ],
)  # fmt: skip
def test_odd_body(client: TestClient, refusal: Refusal, bodies: tuple[bytes, ...]) -> None:
    """What is not a JSON object is refused with 422 and a reason, whatever it is."""
    for body in bodies:
        answer = client.post("/v1/jobs", content=body, headers=JSON)
        (error,) = refusal(answer, 422, "invalid_request")["errors"]

        assert error["pointer"] == ""
        assert error["detail"]


def test_what_is_no_json_is_told_with_the_reason_and_the_place(client: TestClient) -> None:
    answer = client.post("/v1/jobs", content=b'{"model": 1, 2}', headers=JSON)
    (error,) = answer.json()["errors"]

    assert "not JSON" in error["detail"]
    assert "property name" in error["detail"]
    assert "[" not in error["detail"]  # a place is a number, not a list of Python's


def test_other_content_type(client: TestClient, refusal: Refusal) -> None:
    """Another content type is refused, and the one to use is named."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
                         "", "/"):  # fmt: skip
        headers = {"Content-Type": content_type}
        answer = client.post("/v1/jobs", content=json.dumps(DOCUMENT), headers=headers)

        assert answer.status_code in (415, 422)
        assert "application/json" in refusal(answer, answer.status_code)["detail"]


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"]
)
def test_json_content_types(client: TestClient, content_type: str) -> None:
    """All spellings of JSON's content type are understood."""
    answer = client.post(
        "/v1/jobs", content=json.dumps(DOCUMENT), headers={"Content-Type": content_type}
    )

    assert answer.status_code == 202


def test_same_field_twice(client: TestClient) -> None:
    """Of a field that is given twice the last counts, as in every JSON reader of Python."""
    body = b'{"model": "org/name", "pattern": "0.5", "seed": 1, "seed": 2}'

    assert client.post("/v1/jobs", content=body, headers=JSON).json()["spec"]["seed"] == 2


# ------------------------------------------------------------------------ large bodies

LIMIT = 64 * 1024


@pytest.mark.parametrize(
    "url", ["/v1/jobs", "/v1/jobs/00000000-0000-0000-0000-000000000000:extend"]
)
def test_large_body(client: TestClient, refusal: Refusal, url: str) -> None:
    """A body that says it is too large is refused."""
    answer = client.post(url, content=b" " * (LIMIT + 1), headers=JSON)

    assert str(LIMIT) in refusal(answer, 413, "body_too_large")["detail"]


@pytest.mark.parametrize(
    "url", ["/v1/jobs", "/v1/jobs/00000000-0000-0000-0000-000000000000:extend"]
)
def test_large_body_in_chunks(client: TestClient, refusal: Refusal, url: str) -> None:
    """A body that does not say how large it is is refused once too much has come."""
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 10_000
            yield b" " * 10_000

    refusal(client.post(url, content=chunks(), headers=JSON), 413, "body_too_large")


def test_a_body_of_just_the_limit_is_read_in_one_piece_and_in_chunks(client: TestClient) -> None:
    body = json.dumps(DOCUMENT).encode().ljust(LIMIT)

    assert client.post("/v1/jobs", content=body, headers=JSON).status_code == 202
    chunks = iter([body[: LIMIT // 2], body[LIMIT // 2 :]])
    assert client.post("/v1/jobs", content=chunks, headers=JSON).status_code == 202


@pytest.mark.parametrize("length", [b"-1", b"x", b"1e9", b"\xb2", b"9" * 5000])
def test_odd_content_length(client: TestClient, refusal: Refusal, length: bytes) -> None:
    """A length that is no number is no crash."""
    answer = client.post("/v1/jobs", content=b"x", headers={**JSON, b"Content-Length": length})

    assert 400 <= answer.status_code < 500
    refusal(answer, answer.status_code)


# ------------------------------------------------------------------- paths and methods


PATHS = [
    "/v1", "/v1/", "/v1/job", "/v1/jobs/", "/v2/jobs", "/V1/jobs", "/v1//jobs", "/v1/jobs/x/y",
    "/v1/configuration", "/nope", "//", "/%00", "/v1/jobs%2f", "/..%2f..%2fetc/passwd",
    "/healthz/", "/metrics/", "/apix", "/static", "/openapi.json/", "/v1/workers/x", "/\u2713",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "BREW"])
def test_unknown_path(client: TestClient, refusal: Refusal, method: str) -> None:
    """Where nothing is, the answer is 404, whatever is asked for."""
    for path in PATHS:
        refusal(client.request(method, f"http://127.0.0.1:8000{path}"), 404, "not_found")


JOB = "/v1/jobs/00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/jobs"), ("DELETE", "/v1/jobs"), ("OPTIONS", "/v1/jobs"), ("PATCH", JOB),
        ("POST", JOB), ("POST", f"{JOB}/best"), ("POST", f"{JOB}/events"), ("POST", "/v1/workers"),
        ("POST", "/healthz"), ("DELETE", "/readyz"), ("POST", "/metrics"), ("POST", "/docs"),
        ("PUT", "/openapi.json"), ("GET", f"{JOB}:cancel"), ("DELETE", f"{JOB}:extend"),
    ],
)  # fmt: skip
def test_wrong_method(client: TestClient, refusal: Refusal, method: str, path: str) -> None:
    """A method that a path does not know is 405."""
    answer = client.request(method, path)

    refusal(answer, 405, "method_not_allowed")


@pytest.mark.parametrize(
    ("path", "methods"), [("/v1/jobs", {"GET", "POST"}), (JOB, {"GET", "DELETE"})]
)
def test_allow(client: TestClient, path: str, methods: set[str]) -> None:
    """With a 405 come all methods that the path knows (RFC 9110, 15.5.6)."""
    allowed = client.put(path).headers["allow"]

    assert {method.strip() for method in allowed.split(",")} == methods


def test_a_verb_that_does_not_exist_is_not_found(client: TestClient, refusal: Refusal) -> None:
    answer = client.post("/v1/jobs/00000000-0000-0000-0000-000000000000:explode")

    assert answer.status_code in (404, 405)
    refusal(answer, answer.status_code)


# ------------------------------------------------------------------- our own failures


def test_what_we_did_wrong_is_told_without_details_which_are_in_the_log_alone(
    client: TestClient,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise RuntimeError("the secret of the machine")

    monkeypatch.setattr(client.app.state.service.jobs, "page", crash)  # type: ignore[attr-defined]
    with caplog.at_level(logging.ERROR):
        answer = client.get("/v1/jobs")

    refusal(answer, 500, "internal_error")
    assert "secret" not in answer.text
    assert "the secret of the machine" in caplog.text


def test_no_connection_free(client_of: Any, refusal: Refusal) -> None:
    """While all connections are in use, one is asked to come again, as in an outage."""
    client = client_of()
    engine = client.app.state.service.database.engine
    engine.pool._timeout = 0.2
    held = [engine.connect() for _ in range(8)]
    answer = client.get("/v1/jobs")
    for connection in held:
        connection.close()

    refusal(answer, 503, "database_unavailable")
    assert answer.headers["retry-after"]
    assert client.get("/v1/jobs").status_code == 200


def test_texts_are_not_listed(client: TestClient, refusal: Refusal, shared_folder: Path) -> None:
    """A file outside of the folders is refused in the same words whether it exists or not."""
    outside = shared_folder.parent / "outside.txt"
    outside.write_text("secret")
    there, gone = (
        refusal(client.post("/v1/jobs", json=put("/calibration/text", str(path))), 422)
        for path in (outside, shared_folder.parent / "nowhere.txt")
    )

    assert there["detail"].replace("outside", "nowhere") == gone["detail"]


def test_link_out_of_the_folder(client: TestClient, refusal: Refusal, shared_folder: Path) -> None:
    (shared_folder / "link.txt").symlink_to("/etc/passwd")
    answer = client.post("/v1/jobs", json=put("/calibration/text", "link.txt"))

    assert refusal(answer, 422)["errors"][0]["pointer"] == "/calibration/text"
