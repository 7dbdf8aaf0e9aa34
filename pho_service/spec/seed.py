"""
The seeds that every generator in use takes.
"""

from typing import Annotated

from pydantic import Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import Whole

SEEDS = 2**32  # what every generator in use takes
Seed = Annotated[Whole, Field(ge=0, lt=SEEDS)]


def check_seed(seed: int) -> None:
    """Raise InvalidInput unless 0 <= seed < 2**32."""
    if seed < 0:
        raise InvalidInput(f"seed={seed} is below 0.")
    if seed >= SEEDS:
        raise InvalidInput(f"seed={seed} is too large: it must be below {SEEDS}.")
