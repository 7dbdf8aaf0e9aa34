"""Settings that come from files instead of the environment."""

import pytest

from pho_service.errors import InvalidInput
from pho_service.host.settings import read_settings

URL = "postgresql://pho@database/pho"


@pytest.fixture
def secret(tmp_path, monkeypatch):
    """The file that PHO_DATABASE_PASSWORD_FILE names; it holds ``s3:cr/t`` and a line's end."""
    file = tmp_path / "password"
    file.write_text("s3:cr/t\n")
    monkeypatch.setenv("PHO_DATABASE_PASSWORD_FILE", str(file))
    monkeypatch.setenv("PHO_DATABASE_URL", URL)
    return file


def database_url():
    """The URL that is used, password and all."""
    url = read_settings().database_url
    assert url is not None
    return url.get_secret_value()


@pytest.mark.usefixtures("secret")
def test_the_password_in_the_file_becomes_the_urls_escaped_without_the_lines_end(monkeypatch):
    assert database_url() == "postgresql://pho:s3%3Acr%2Ft@database/pho"
    assert "s3" not in repr(read_settings())
    monkeypatch.setenv("PHO_DATABASE_URL", "postgresql://pho:old@database/pho?sslmode=require")
    assert database_url() == "postgresql://pho:s3%3Acr%2Ft@database/pho?sslmode=require"
    monkeypatch.delenv("PHO_DATABASE_URL")
    with pytest.raises(InvalidInput, match=r"PHO_DATABASE_URL=None .*PHO_DATABASE_PASSWORD_FILE"):
        read_settings()


@pytest.mark.parametrize(("content", "reason"), [(None, "cannot be read"), ("\n", "is empty")])
def test_an_unusable_file_is_named(secret, content, reason):
    secret.unlink()
    if content is not None:
        secret.write_text(content)

    with pytest.raises(InvalidInput, match=rf"PHO_DATABASE_PASSWORD_FILE=.*password.*{reason}"):
        read_settings()


def test_an_empty_list_of_patterns_allows_nothing_not_the_empty_name():
    assert read_settings(hub_models=" ").hub_models == ()
