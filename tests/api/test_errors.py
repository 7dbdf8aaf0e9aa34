"""What a caller does wrong: each wrong value at its place, and every answer a problem."""

import json

import pytest

from pho_service.spec.fields import CalibrationSpec
from pho_service.spec.job import JobSpec
from pho_service.spec.objective import SAMPLERS

DOCUMENT = {"model": "org/name", "pattern": "0.5", "minutes": None}
JSON = {"Content-Type": "application/json"}


def put(pointer, value):
    document = dict(DOCUMENT)
    *folders, last = pointer.strip("/").split("/")
    place = document
    for folder in folders:
        place = place.setdefault(folder, {})
    place[last] = value
    return document


@pytest.fixture
def rejected(client, refusal):
    """Submit what must be refused; gives the errors."""

    def ask(document):
        answer = client.post("/v1/jobs", content=json.dumps(document), headers=JSON)
        errors = refusal(answer, 422, "invalid_request")["errors"]
        assert client.get("/v1/jobs").json()["jobs"] == []
        return errors

    return ask


WRONG = [
    ("/model", 5, "string"),
    ("/model", "a\x00b", "control characters"),
    ("/model", "/etc/passwd", "does not lie below"),
    ("/model", "org/" + "a" * 300, ""),
    ("/calibration/text", "a" * 300, "does not lie below"),
    ("/pattern", "half", "neither a number nor N:M"),
    ("/pattern", "9" * 500 + ":4", ""),
    ("/name", "a\nb", "control characters"),
    ("/sampler", "luck", f"{next(iter(SAMPLERS))!r}, "),
    ("/trials", 10**400, ""),
    ("/trials", "200", "integer"),
    ("/seed", 2**32, "4294967296"),
    ("/timeout_s", float("nan"), "finite"),
    ("/calibration", [], "dictionary"),
    ("/calibration/text", "nowhere.txt", "does not exist"),
    ("/calibration/kernel_sizes", "3,5", "list"),
    ("/calibration/kernel_sizes", [3, 5, 1001], "999"),
    ("/search_space/row_share", [0.8, 0.2], "low <= high"),
]


def test_each_wrong_value_is_refused_at_its_own_json_pointer_with_the_rule(rejected):
    for pointer, value, says in WRONG:
        (error,) = rejected(put(pointer, value))

        # An item of a list is named more exactly than the list.
        assert error["pointer"].startswith(pointer), pointer
        assert says in error["detail"]
        assert "parameter" not in error


def test_all_wrong_values_are_told_at_once_of_thousands_a_hundred(rejected, client, refusal):
    errors = rejected(
        {"pattern": "half", "trials": "many", "calibration": {"samples": 0, "bos": 1}, "x": 1}
    )

    assert {e["pointer"] for e in errors} == {
        "/model", "/pattern", "/trials", "/calibration/samples", "/calibration/bos", "/x",
    }  # fmt: skip
    document = {**DOCUMENT, **{f"field {number}": 1 for number in range(3000)}}
    problem = refusal(client.post("/v1/jobs", json=document), 422, "invalid_request")
    assert len(problem["errors"]) == 100
    assert problem["detail"].startswith("/field 0: ")
    assert problem["detail"].endswith("(and 2999 more)")


def test_an_unknown_field_is_refused_with_the_fields_that_are_known_there(rejected):
    for pointer, document in (("/zz", JobSpec), ("/calibration/zz", CalibrationSpec)):
        (error,) = rejected(put(pointer, 1))

        assert error["pointer"] == pointer
        known = ", ".join(document.model_fields)
        assert error["detail"].startswith(f"unknown field; known are {known}")
    for pointer, meant in (
        ("/trails", "trials"), ("/calibration/sample", "samples"),
        ("/samples", "calibration.samples"), ("/context_length", "calibration.context_length"),
        ("/ignore", "steps.linears.ignore"),
    ):  # fmt: skip
        (error,) = rejected(put(pointer, 1))

        assert error["detail"] == f"unknown field; did you mean {meant}?"
    # Odd names are escaped as RFC 6901 has it.
    for name, pointer in (("a/b", "/a~1b"), ("~1", "/~01"), ("", "/"), ("é\u2028🙂", "/é\u2028🙂")):
        (error,) = rejected({**DOCUMENT, name: 1})

        assert error["pointer"] == pointer


def test_odd_body(client, refusal):
    """What is not a JSON object is refused with 422 and a reason, whatever it is."""
    for body in (
        b"", b"{", b"{}}", b"nope", b'{"a": }', b"{'a': 1}", b'{"a": 1,}', b"-", b"\x00",
        b'"' + b"x" * 60_000, b"\xff\xfe", b'{"model": "\xff"}', b"\xed\xa0\x80", b"[" * 60_000,
        b'{"a":' * 10_000, b"1" * 60_000, b'{"trials": ' + b"1" * 5_000 + b"}", b"null", b"[]",
        b'"text"', b"5", b"true", b"NaN", b"1e999", b'[{"model": "a", "pattern": "0.5"}]',
    ):  # fmt: skip
        answer = client.post("/v1/jobs", content=body, headers=JSON)
        (error,) = refusal(answer, 422, "invalid_request")["errors"]

        assert error["pointer"] == ""
        assert error["detail"]
        if body == b"{'a': 1}":  # the reason and the place, which is a number, not Python's list
            assert "not JSON" in error["detail"]
            assert "property name" in error["detail"]
            assert "[" not in error["detail"]
    for pointer in ("/x\ud800", "/calibration/text"):  # half a character
        document = put(pointer, "a\udfff")  # json.dumps writes \udfff, which is valid JSON
        answer = client.post("/v1/jobs", content=json.dumps(document), headers=JSON)
        assert len(refusal(answer, 422)["errors"]) == 1


def test_a_body_must_be_json_by_its_content_type(client, refusal):
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
                         "", "/"):  # fmt: skip
        headers = {"Content-Type": content_type}
        answer = client.post("/v1/jobs", content=json.dumps(DOCUMENT), headers=headers)

        assert answer.status_code in (415, 422)
        assert "application/json" in refusal(answer, answer.status_code)["detail"]
    for content_type in ("APPLICATION/JSON; charset=utf-8", "application/x+json"):
        headers = {"Content-Type": content_type}
        answer = client.post("/v1/jobs", content=json.dumps(DOCUMENT), headers=headers)
        assert answer.status_code == 202


LIMIT = 64 * 1024


def test_a_large_body_is_refused_declared_or_not(client, refusal):
    for url in ("/v1/jobs", "/v1/jobs/00000000-0000-0000-0000-000000000000:extend"):
        for body in (b" " * (LIMIT + 1), (b" " * 10_000 for _ in range(100))):
            answer = client.post(url, content=body, headers=JSON)

            assert str(LIMIT) in refusal(answer, 413, "body_too_large")["detail"]
    body = json.dumps(DOCUMENT).encode().ljust(LIMIT)
    for content in (body, iter([body[: LIMIT // 2], body[LIMIT // 2 :]])):
        assert client.post("/v1/jobs", content=content, headers=JSON).status_code == 202


def test_an_odd_length_is_no_crash(client, refusal):
    for length in (b"-1", b"x", b"1e9", b"\xb2", b"9" * 5000):
        answer = client.post("/v1/jobs", content=b"x", headers={**JSON, b"Content-Length": length})

        assert 400 <= answer.status_code < 500
        refusal(answer, answer.status_code)


PATHS = [
    "/v1", "/v1/", "/v1/job", "/v1/jobs/", "/v2/jobs", "/V1/jobs", "/v1//jobs", "/v1/jobs/x/y",
    "/v1/configuration", "/nope", "//", "/%00", "/v1/jobs%2f", "/..%2f..%2fetc/passwd",
    "/healthz/", "/metrics/", "/apix", "/static", "/openapi.json/", "/v1/workers/x", "/\u2713",
]  # fmt: skip


JOB = "/v1/jobs/00000000-0000-0000-0000-000000000000"


def test_where_nothing_is_is_404_other_methods_are_405_which_says_what_is_allowed(client, refusal):
    for path in PATHS:
        for method in ("GET", "POST", "BREW"):
            refusal(client.request(method, f"http://127.0.0.1:8000{path}"), 404, "not_found")
    for method, path in (
        ("OPTIONS", "/v1/jobs"), ("PATCH", JOB), ("POST", f"{JOB}/best"), ("GET", f"{JOB}:cancel"),
        ("DELETE", "/v1/configurations"), ("POST", "/healthz"), ("PUT", "/openapi.json"),
    ):  # fmt: skip
        refusal(client.request(method, path), 405, "method_not_allowed")
    # All methods that the path knows come with it (RFC 9110, 15.5.6).
    for path, methods in (("/v1/jobs", {"GET", "POST"}), (JOB, {"GET", "DELETE"})):
        allowed = client.put(path).headers["allow"]

        assert {method.strip() for method in allowed.split(",")} == methods


def test_while_all_connections_are_in_use_it_is_503(client_of, refusal):
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


def test_texts_are_not_listed(client, refusal, rejected, tmp_path):
    """
    A file outside of the folders is refused in the same words whether it exists or not; one that is
    nearly one of the folders' is asked for.
    """
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("secret")
    there, gone = (
        refusal(client.post("/v1/jobs", json=put("/calibration/text", str(path))), 422)
        for path in (outside, tmp_path.parent / "nowhere.txt")
    )

    assert there["detail"].replace("outside", "nowhere") == gone["detail"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "calibration.txt").write_text("text")
    (error,) = rejected(put("/calibration/text", "texts/calibraton.txt"))
    assert error["pointer"] == "/calibration/text"
    assert error["detail"].endswith("Did you mean texts/calibration.txt?")


def test_an_id_with_a_line_end_behind_it_is_not_an_id(client):
    job = client.post("/v1/jobs", json={"model": "org/name", "pattern": "0.5"}).json()["id"]

    assert client.get(f"/v1/jobs/{job}").status_code == 200
    for path in (f"/v1/jobs/{job}%0a", f"/jobs/{job}%0a", f"/v1/jobs/{job}/best%0a"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), path
