"""Two pretended cards for a whole file of tests, and models on them that are calibrated once."""

import pytest
from pretended_device import pretend
from pretended_subjects import Subject, write_model


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """Two cards for the whole file, and a cache that is not the user's."""
    with pytest.MonkeyPatch.context() as patch, pretend(2) as found:
        patch.setenv("PHO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield found


@pytest.fixture(scope="module")
def subject_of(cards, texts_of_all, tmp_path_factory):
    """Each subject, loaded and calibrated once."""
    made = {}
    folder = tmp_path_factory.mktemp("models")

    def make(name):
        if name not in made:
            write_model(name, folder / name, texts_of_all["tokenizer"])
            made[name] = Subject(name, folder / name, texts_of_all, str(cards[0].device))
        return made[name]

    return make
