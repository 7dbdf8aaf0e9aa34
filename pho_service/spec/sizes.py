"""Sizes of memory as people write them."""

import re

from pho_service.errors import InvalidInput


def parse_bytes(text: str, option: str) -> int:
    """
    The bytes that ``8GiB``, ``800 MB`` or ``8e9`` say.

    Raises:
        InvalidInput: It is not a size; names the option.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    try:
        number, unit = found.groups()  # type: ignore[union-attr]
        # ByteSize reads neither 8e9 nor 8Gi.
        one = TypeAdapter(ByteSize).validate_python(f"1{unit}b" if unit[-1:] == "i" else f"1{unit}")
        return int(float(number) * one)
    except (AttributeError, ValidationError, ValueError, OverflowError):
        raise InvalidInput(
            f"{option} {text!r} is not a size. Give a number with a unit: 8GiB, 800MB."
        ) from None
