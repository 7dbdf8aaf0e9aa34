"""
Work with the cache alone while the Hugging Face hub is away, instead of waiting for it.

The hub's libraries would ask again for some 23 seconds, for each file of a model.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import huggingface_hub

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0  # with a hub that does not answer, before it counts as away


def hub_is_away() -> bool:
    """Return whether nothing may be asked of the hub, or it cannot be reached; asks once."""
    if any(place.HF_HUB_OFFLINE for place in _places()):  # or HF_DATASETS_OFFLINE
        return True
    try:
        httpx.head(huggingface_hub.constants.ENDPOINT, timeout=PATIENCE_S)
    except httpx.HTTPError:
        return True
    return False


@contextmanager
def hub_or_cache(*, wanted: bool = True) -> Iterator[None]:
    """
    Let the hub's libraries read the cache alone, inside, if the hub is away.

    Args:
        wanted: Whether anything is on the hub; if not, it is not asked whether it is there.
    """
    if not wanted or not hub_is_away():
        yield
        return
    logger.info("the hub is away: models and data sets are looked for in the cache alone")
    places = _places()
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = was


def _places() -> list[Any]:
    """Where the libraries look whether they may ask the hub; `datasets` is not loaded for it."""
    datasets = sys.modules.get("datasets")
    return [huggingface_hub.constants, *([datasets.config] if datasets else [])]
