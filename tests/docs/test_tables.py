"""Tables of the documentation name what the code has, no less and no more."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

import pytest
from pydantic import BaseModel, SecretStr

from pho_service.host.settings import Settings
from pho_service.spec.configuration import Configuration, Confirmation, Rating
from pho_service.spec.job import JobSpec
from pho_service.spec.pattern import Coefficients
from pho_service.spec.steps import Allocation, Steps

DOCS = Path(__file__).parents[2] / "docs"


def rows(page, heading):
    """The cells of the first table under a heading."""
    _, _, section = (DOCS / page).read_text().partition(f"\n## {heading}\n")
    table = re.search(r"^\| --- .*\n((?:\|.*\n)+)", section, re.MULTILINE)
    assert table is not None, f"{page} has no table under {heading!r}"
    cells = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in table[1].splitlines()]
    return [[cell.strip() for cell in row] for row in cells]


def named(cell):
    return re.findall(r"`([^`]+)`", cell)


def shown(value):
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_each_setting_is_in_its_table_once_with_its_default():
    documented = []
    wrong = {}
    for variables, default, *_ in rows("service.md", "Settings"):
        names = named(variables)
        documented += names
        known = [Settings.model_fields.get(n.removeprefix("PHO_").lower()) for n in names]
        values = [shown(f.default) for f in known if f is not None and f.default is not None]
        expected = ", ".join(dict.fromkeys(values))
        if default.replace("`", "") != expected:
            wrong[variables] = (default, expected)

    assert sorted(documented) == sorted(f"PHO_{name.upper()}" for name in Settings.model_fields)
    assert not wrong, "default in the table, default in the code"


def keys(document):
    if issubclass(document, BaseModel):
        return list(document.model_fields)
    return [field.name for field in fields(document)]


def parts(annotation):
    if get_origin(annotation) in (Union, UnionType, list):
        return [part for argument in get_args(annotation) for part in parts(argument)]
    is_document = isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or is_dataclass(annotation)
    )
    return [annotation] if is_document else []


JOB_ROWS = {name: row for row in rows("service.md", "A job") for name in named(row[0])}


def test_each_field_of_a_job_is_in_its_table_and_no_other():
    assert JOB_ROWS.keys() == JobSpec.model_fields.keys()


@pytest.mark.parametrize("field", JobSpec.model_fields)
def test_each_field_of_a_part_of_a_job_is_named_in_the_parts_row(field):
    said = " ".join(JOB_ROWS[field][2:])
    names = [n for part in parts(JobSpec.model_fields[field].annotation) for n in keys(part)]

    assert [name for name in names if f"`{name}`" not in said and f'"{name}"' not in said] == []


@pytest.mark.parametrize(
    "document", [Configuration, Coefficients, Steps, Allocation, Confirmation, Rating]
)
def test_each_key_of_config_json_is_named_on_its_page(document):
    text = (DOCS / "configuration.md").read_text()

    assert not {k for k in keys(document) if f"`{k}`" not in text and f'"{k}"' not in text}
