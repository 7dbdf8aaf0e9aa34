"""Two pretended cards for a whole file of tests, and models on them that are calibrated once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pretended_device import pretend
from pretended_machine import Cards
from pretended_subjects import Subject, write_model


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cards]:
    """Two cards for the whole file, and a cache that is not the user's."""
    with pytest.MonkeyPatch.context() as patch, pretend(2) as found:
        patch.setenv("PHO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield found


@pytest.fixture(scope="module")
def subject_of(
    cards: Cards, texts_of_all: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Subject]:
    """Each subject, loaded and calibrated once."""
    made: dict[str, Subject] = {}
    folder = tmp_path_factory.mktemp("models")

    def make(name: str) -> Subject:
        if name not in made:
            write_model(name, folder / name, texts_of_all["tokenizer"])
            made[name] = Subject(name, folder / name, texts_of_all, str(cards[0].device))
        return made[name]

    return make
