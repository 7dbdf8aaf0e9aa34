"""Messages name what is asked for as each of their readers knows it."""

import ast
import functools
import inspect
import re
from contextlib import nullcontext
from dataclasses import fields
from functools import cache
from pathlib import Path

import click
import pytest

import pho_service as pho
from pho_service.cli import main
from pho_service.cli.document import DocumentCommand, option
from pho_service.errors import InvalidInput, field_name, told_to
from pho_service.spec.job_options import argument, document_fields, entry, job_fields
from pho_service.spec.recovery import Recovery
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Steps

ROOT = Path(pho.__file__).parents[1]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
IN_A_COMMAND = re.compile(r"`[^`]*`|\(torchrun [^)]*\)|pip install [^,]*")
# Files whose strings have options all the same, and why.
EXCEPTIONS = {
    "pho_service/api/new_job.py": "a command that does what the form does",
    "pho_service/api/serving.py": "whoever starts `pho serve` reads it",
    "pho_service/shown/words.py": "commands, as a whole",
    "pho_service/spec/job_options.py": "commands, as a whole",
    "storage/backup.py": "whoever runs `pho backup` and `pho restore` reads it",
    "storage/database.py": "whoever starts `pho serve` reads it",
    "storage/embedded.py": "whoever starts `pho serve` reads it",
    "workers/__main__.py": "whoever starts `pho worker` reads it",
    "workers/process.py": "whoever starts `pho worker` reads it",
}
# Names of what no job asks for: only verbs and functions that no job runs have these messages.
OF_NO_JOB = {
    "pho_service/planning/costs.py": {"device_memory"},  # of a card that has another name
    "pho_service/models/loading.py": {"device", "device_map"},  # which a worker sees to
    "pho_service/pipeline/bench.py": {"new_tokens"},
    "pho_service/pipeline/compare.py": {"other_family", "presets"},
    "pho_service/pipeline/recover.py": {"device_map"},  # several processes are no worker's
    "pho_service/pipeline/search.py": {"study"},  # where a study's URL is given
    "pho_service/pipeline/writing.py": {"tokens"},
    "pho_service/pipeline/llama_bench.py": {"batch", "device", "runtime", "types"},
    # Of a comparison and of benchmarks, which no job makes.
    "pho_service/spec/verbs.py": {"seeds", "types", "converter", "context_length", "runtime"},
}
# Names of what only the terminal and jobs ask for.
NOT_IN_PYTHON = {
    # Python loads data sets with `datasets`.
    "calibration/data_file", "calibration/dataset_config", "calibration/split",
    "calibration/field",  # has other words
    "device_memory",  # of `pho plan`
}  # fmt: skip


@cache
def below_the_faces():
    """The files of the product but the command line."""
    paths = [
        p for part in ("pho_service", "storage", "workers") for p in (ROOT / part).rglob("*.py")
    ]
    return {
        name: path.read_text()
        for path in sorted(paths)
        if not (name := path.relative_to(ROOT).as_posix()).startswith("pho_service/cli/")
    }


def sentences(node):
    """The strings in a part of a file, f-strings as a whole; no docstrings, no helps of options."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
        yield node.value
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "FieldShown":
        return
    for child in ast.iter_child_nodes(node):
        yield from sentences(child)


@cache
def names():
    """What messages name, by the files, and whether there are other words where a job has none."""
    return [*names_in_files()]


def names_in_files():
    for name, text in below_the_faces().items():
        if "field_name(" not in text:
            continue
        tree = ast.parse(text)
        other = {id(n.values[0]) for n in ast.walk(tree) if isinstance(n, ast.BoolOp)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "field_name":
                assert isinstance(node.args[0], ast.Constant), f"{name}:{node.lineno}"
                yield name, node.args[0].value, id(node) in other


PATHS = sorted({path for _, path, _ in names()})
PARENT = click.Context(main, **main.context_settings)
VERBS = {verb: main.get_command(PARENT, verb) for verb in main.list_commands(PARENT)}


def options(command):
    return {
        name
        for each in command.get_params(click.Context(command, parent=PARENT))
        for name in each.opts
    }


def test_no_message_outside_the_command_line_has_the_name_of_an_option():
    found = [
        f"{name}: {sentence}"
        for name, text in below_the_faces().items()
        if name not in EXCEPTIONS
        for sentence in sentences(ast.parse(text))
        if OPTION.search(IN_A_COMMAND.sub("", sentence))
    ]

    assert not found


def test_what_is_excepted_is_there():
    assert {*EXCEPTIONS} <= {*below_the_faces()}
    assert {(f, path) for f, paths in OF_NO_JOB.items() for path in paths} <= {
        (name, path) for name, path, _ in names()
    }


@pytest.mark.parametrize("path", PATHS)
def test_a_name_on_the_terminal_is_an_option_of_the_verb_that_runs_or_of_some_verb(path):
    asking = [v for v in VERBS.values() if path in getattr(v, "names", {})]
    with click.Context(asking[0], parent=PARENT) if asking else nullcontext():
        assert option(path) in set().union(*map(options, VERBS.values()))
    for verb, command in VERBS.items():
        if isinstance(command, DocumentCommand) and path in {f.path for f in command.fields}:
            with click.Context(command, info_name=verb, parent=PARENT):
                assert option(path) in options(command)


@pytest.mark.parametrize("path", PATHS)
def test_a_name_in_python_is_an_argument(path):
    arguments = {
        name
        for function in map(functools.partial(getattr, pho), pho.__all__)
        for name in inspect.signature(function).parameters
    }
    keys = {field.name for part in (Steps, SearchSpace, Recovery) for field in fields(part)}

    assert (argument(path) in arguments | keys) is (path not in NOT_IN_PYTHON)


@pytest.mark.parametrize(("name", "path", "has_other_words"), sorted({*names()}))
def test_a_name_in_a_job_is_a_field_of_its_document_or_there_are_other_words(
    name, path, has_other_words
):
    if path in document_fields():
        assert entry(path) == path.replace("/", ".")
        assert path in job_fields()
    else:
        assert entry(path) == ""
        assert has_other_words or path in OF_NO_JOB.get(name, set())


def test_each_face_says_a_value_as_its_reader_writes_it():
    path, said = "calibration/context_length", []
    for wording in (option, argument, entry):
        with told_to(wording):
            said.append(
                str(InvalidInput(f"Take {field_name(path, 64)} or {field_name('stream', True)}."))
            )

    assert said == [
        "Take --context-length 64 or --stream.",
        "Take context_length=64 or stream=True.",
        "Take calibration.context_length=64 or stream=true.",
    ]
    assert field_name(path) == "context_length"  # where nobody has said who reads
