"""
A configuration taken apart: what each of its steps adds.
"""

from dataclasses import fields, replace
from typing import Any

from pho_service.errors import InvalidInput
from pho_service.spec.candidate import Candidate
from pho_service.spec.steps import Steps

_WORDS = {"repruning": "re-pruning"}


def step_by_step(name: str, candidate: Candidate) -> list[tuple[str, Candidate]]:
    """
    Give the score alone, then with one step more each time, in the order of the pipeline.

    A step that has no meaning without the next is added together with it.

    Args:
        name: Name of the candidate; every row begins with it.
        candidate: What the last row prunes with.

    Returns:
        (name, candidate) of each row.
    """
    steps = Steps(linears=candidate.steps.linears)
    rows = [(f"{name}: score", replace(candidate, steps=steps))]
    added: dict[str, Any] = {}
    for field in fields(Steps):
        value = getattr(candidate.steps, field.name)
        if value == getattr(steps, field.name):
            continue
        added[field.name] = value
        try:
            row = replace(candidate, steps=replace(steps, **added))
        except InvalidInput:
            continue
        words = (f"{_WORDS.get(n, n)} {getattr(v, 'method', v)}" for n, v in added.items())
        rows.append((f"{name}: + {', '.join(words)}", row))
        steps, added = row.steps, {}
    return rows
