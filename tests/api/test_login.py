"""The login of browsers: a form, a cookie, and the ways that it ends."""

import base64

import pytest
from sqlalchemy import func, update

from pho_service.api.guard import local
from pho_service.api.service import Caller
from storage.keys import key_digest
from storage.tables import sessions

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
JOB = "/jobs/00000000-0000-0000-0000-000000000000"
DOCUMENT = {"model": "org/name", "pattern": "0.5", "minutes": None}


@pytest.fixture
def secret(keys):
    return keys.create("admin", sees_all=True)[1]


def log_in(client, key, to="/", **headers):
    """Send the form; the answer is not followed, its cookie is kept."""
    form = {"key": key, "next": to}
    return client.post("/login", data=form, headers=headers, follow_redirects=False)


@pytest.mark.usefixtures("secret")
def test_a_browser_is_led_to_the_login_a_program_gets_a_401(client):
    for path, to in (
        ("/", "/login"),
        (f"{JOB}?a=1&b=%2F", f"/login?next=%2F{JOB[1:].replace('/', '%2F')}%3Fa%3D1%26b%3D%252F"),
        ("/v1/jobs/x/report", "/login?next=%2Fv1%2Fjobs%2Fx%2Freport"),
        ("/docs", "/login?next=%2Fdocs"),
        ("/dashboard", "/login?next=%2Fdashboard"),
    ):
        answer = client.get(path, headers=BROWSER, follow_redirects=False)
        program = client.get(path)
        loaded = client.get(path, headers={"Accept": "*/*", "Sec-Fetch-Mode": "cors"})
        scheme = "Bearer" if path.startswith("/v1") else 'Basic realm="PHO"'

        assert (answer.status_code, answer.headers["location"]) == (303, to)
        assert (program.status_code, program.headers["www-authenticate"]) == (401, scheme)
        assert (loaded.status_code, loaded.headers["www-authenticate"]) == (401, "Bearer")
    page = client.get(to, headers=BROWSER)
    assert page.status_code == 200
    assert "expired" not in page.text
    assert '<label for="key">Key</label>' in page.text
    assert client.head("/login").status_code == 200
    for path in ("/new", "/new/check", f"{JOB}/cancel"):
        sent = client.post(path, data={"model": "typed"})
        assert (sent.status_code, "pho keys create" in sent.text) == (401, True)
    icon = client.get("/favicon.ico")  # needs no key
    assert icon.headers["content-type"].startswith("image/svg+xml")
    assert icon.headers["cache-control"] == "max-age=86400"
    assert icon.text.startswith("<svg ")
    assert client.head("/favicon.ico").status_code == 200
    assert '<link rel="icon" href="/favicon.ico"' in page.text


def test_a_key_leads_back_and_opens_all(client, keys, secret):
    answer = log_in(client, f" {secret}\n", to=f"{JOB}?a=1")
    cookie = answer.headers["set-cookie"]
    with keys.database.transaction() as connection:
        rows = str(connection.exec_driver_sql("SELECT * FROM pho.sessions").all())
    opened = {
        path: client.get(path, headers=BROWSER, follow_redirects=False).status_code
        for path in ("/", "/new", "/v1/jobs", "/docs", "/openapi.json", "/dashboard/", "/metrics")
    }
    job = client.post("/v1/jobs", json=DOCUMENT)
    form = {"verb": "pause", "job": job.json()["id"]}
    asked = client.post("/jobs", data=form, follow_redirects=False)

    assert (answer.status_code, answer.headers["location"]) == (303, f"{JOB}?a=1")
    assert "HttpOnly; Max-Age=604800; Path=/; SameSite=lax" in cookie
    assert "Secure" not in cookie
    assert secret not in cookie
    assert client.cookies["pho_session"] not in rows
    assert secret not in rows
    assert {*opened.values()} <= {200, 302}
    assert (job.status_code, asked.status_code) == (202, 303)
    assert "Log out" in client.get("/").text
    again = client.get("/login?next=/new", follow_redirects=False)
    assert again.headers["location"] == "/new"
    encrypted = client.post(
        "https://127.0.0.1:8000/login", data={"key": secret}, follow_redirects=False
    )
    assert encrypted.headers["set-cookie"].endswith("SameSite=lax; Secure")


def test_a_login_ends_for_all_copies_of_its_cookie(client, secret):
    log_in(client, secret)
    token = client.cookies["pho_session"]
    service = client.app.state.service  # type: ignore[attr-defined]  # FastAPI's
    caller = Caller(key_id=None, sees_all=True, session=key_digest(token))
    before = service.lets_in(caller)
    answer = client.post("/logout", follow_redirects=False)
    kept = "pho_session" in client.cookies
    copy = client.get("/v1/jobs", headers={"Cookie": f"pho_session={token}"})

    assert before
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert not kept
    assert copy.status_code == 401
    assert not service.lets_in(caller)
    assert client.post("/logout", follow_redirects=False).status_code == 303


def test_a_wrong_key_gives_no_cookie(client_of, secret):
    client = client_of(max_wrong_keys_per_minute=2)
    empty, *wrong, late = (
        log_in(client, key, to="/new") for key in ("", "pho_x", secret[:-1], "pho_y")
    )

    assert empty.status_code == 422
    assert "Type a key." in empty.text
    for answer in wrong:
        assert answer.status_code == 403
        assert "This key is not known, has expired, or was revoked." in answer.text
        assert 'aria-invalid="true"' in answer.text
        assert '<input type="hidden" name="next" value="/new">' in answer.text
        assert "set-cookie" not in answer.headers
        assert "pho_x" not in answer.text
    assert late.status_code == 429
    assert "PHO_MAX_WRONG_KEYS_PER_MINUTE" in late.text
    assert int(late.headers["retry-after"]) > 0


def test_a_login_that_is_over_says_so(client, secret, keys):
    log_in(client, secret)
    with keys.database.transaction() as connection:
        connection.execute(update(sessions).values(expires_at=func.now()))
    led = client.get(JOB, headers=BROWSER, follow_redirects=False)
    page = client.get(led.headers["location"], headers=BROWSER)
    sent = client.post("/new", data={"model": "typed"}, headers=BROWSER)
    api = client.get("/v1/jobs")
    back = log_in(client, secret, to=JOB)
    with keys.database.transaction() as connection:
        left = connection.execute(sessions.select()).all()

    assert led.status_code == 303
    assert "Your login has expired, or its key was revoked." in page.text
    assert f"you are back at <code>{JOB}</code>" in page.text
    assert sent.status_code == 401
    assert "Your login has expired" in sent.text
    assert "load this page again to send the form once more" in sent.text
    assert '<a href="/login" target="_blank" rel="noopener">' in sent.text
    assert (api.status_code, api.headers["www-authenticate"]) == (401, "Bearer")
    assert back.headers["location"] == JOB
    assert [bytes(row.sha256) for row in left] == [key_digest(client.cookies["pho_session"])]


def test_revoked(client, keys, submit, bearer_of):
    """A login opens what its key opens, and nothing once that is revoked."""
    key, secret = keys.create("own", sees_all=False)
    job = submit(headers=bearer_of("other"))["id"]
    log_in(client, secret)
    others = client.get(f"/jobs/{job}", headers=BROWSER)
    dashboard = client.get("/dashboard", headers=BROWSER)
    keys.revoke(key.prefix)

    assert (others.status_code, dashboard.status_code) == (404, 403)
    assert client.get("/v1/jobs").status_code == 401
    assert client.get("/", headers=BROWSER, follow_redirects=False).status_code == 303


def test_a_sent_key_goes_before_a_login(client, keys, secret):
    own = keys.create("own", sees_all=False)[1]
    log_in(client, secret)
    wrong = base64.b64encode(b"me:pho_old").decode()

    def status(authorization):
        headers = {"Authorization": authorization}
        return int(client.get("/metrics", headers=headers).status_code)

    assert status(f"Bearer {own}") == 403
    assert status("Bearer pho_wrong") == 401
    assert status(f"Basic {wrong}") == 200


def test_where_no_key_is_needed_the_login_leads_on(client):
    client.cookies.set("pho_session", "old")

    assert client.get("/login?next=/new", follow_redirects=False).headers["location"] == "/new"
    assert client.get("/", headers=BROWSER).status_code == 200
    assert log_in(client, "pho_x").status_code == 403


def test_a_login_leads_to_paths_of_this_service_alone_and_never_in_a_circle():
    ours = ["/", "/new?job=1&x=%0A", "/jobs/a~b", "/?name=//evil.example", "/dashboard#x"]
    others = [
        "", "//evil.example", "/\\evil.example", "/\t/evil.example", "/\n/evil.example", "\\", "x",
        "https://evil.example", "javascript:alert(1)", "/a b", "/ä", "/x\\y", "/login?next=/",
        "/logout", "/" + "x" * 2000,
    ]  # fmt: skip

    assert [local(path) for path in ours] == ours
    assert {local(path) for path in others} == {"/"}
