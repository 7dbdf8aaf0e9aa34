"""
The seeds that every generator in use takes.
"""

from pho_service.errors import InvalidInput

SEEDS = 2**32  # what every generator in use takes


def check_seed(seed: int) -> None:
    """Raise InvalidInput unless 0 <= seed < 2**32."""
    if seed < 0:
        raise InvalidInput(f"seed={seed} is below 0.")
    if seed >= SEEDS:
        raise InvalidInput(f"seed={seed} is too large: it must be below {SEEDS}.")
