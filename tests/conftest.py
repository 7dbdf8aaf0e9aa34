"""
Fixtures that several folders share: a random Llama that runs in milliseconds, and what it says.

Each test gets its own, so a test may change what it is given. All are the same every time.
"""

import gc
import itertools
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from pretended_device import pretend
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pho_service.models.architecture import prunable_linears
from pho_service.models.scratch import Memo
from pho_service.pipeline import writing
from pho_service.planning.shapes import Header, TensorHeader
from pho_service.pruning.statistics import gather
from pho_service.spec.configuration import NEW_TOKENS
from storage import embedded
from storage.database import Database
from storage.embedded import embedded_postgresql
from storage.jobs import JobStore

VOCABULARY = 256
_CACHES = itertools.count()

# pytest-xdist says how wide the terminal is; tests print into pipes, which have no width.
os.environ.pop("COLUMNS", None)

# `make fuzz` takes other examples each time, and many.
settings.register_profile("fuzz", max_examples=300, deadline=None, database=None)


# What takes longest comes first, so that no process is left alone with one of them at the end.
# Most of them have one test in `make test`, marked ``thorough(False)`` in a file that is thorough.
SLOWEST = (
    "test_images", "docs/test_tutorial", "docs/test_notebook", "pretended/test_whole_product",
    "workers/test_kills", "workers/test_minutes", "workers/test_changed_inputs", "api/test_serving",
    "workers/test_pruning", "workers/test_jobs_run", "pipeline/test_recover_together",
    "workers/test_one_best", "workers/test_cuts", "workers/test_points", "pipeline/test_recover",
    "api/test_accessibility", "workers/test_transfers", "workers/test_calibrations",
    "api/test_front_browser", "workers/test_tasks", "api/test_openapi", "pipeline/test_export",
    "docs/test_python",
)  # fmt: skip


# Tests that share a database empty it without regard to what refers to what, and one reads who may
# come in; the owner of the database is no superuser.
embedded._MAKE_OWNER += """\
GRANT SET ON PARAMETER session_replication_role TO pho;
GRANT SELECT ON pg_hba_file_rules TO pho;
GRANT EXECUTE ON FUNCTION pg_hba_file_rules() TO pho;
"""


def pytest_addoption(parser):
    """``--thorough`` runs all tests."""
    parser.addoption(
        "--thorough", action="store_true", help="run the tests that are marked as thorough, too"
    )


def pytest_configure(config):
    """
    Register examples that are the same each time, and few.

    Tests choose them by name: as a default, "suite" would change what schemathesis comes upon.
    """
    examples = 60 if config.getoption("--thorough") else 20
    settings.register_profile(
        "suite", max_examples=examples, deadline=None, derandomize=True, database=None
    )


def pytest_collection_modifyitems(config, items):
    """Leave out what is only for ``--thorough``; bring the files of ``SLOWEST`` to the front."""
    if not config.getoption("--thorough"):
        marks = [(item, item.get_closest_marker("thorough")) for item in items]
        left_out = [item for item, mark in marks if mark and mark.args != (False,)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in {*left_out}]
    places = {f"tests/{name}.py": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_collection_finish():
    """Let collections of garbage, which some tests ask for, pass by what all have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_home(tmp_path_factory):
    """Front ends write the mark of their artifact store here, if a test gives no other place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHO_DATA_DIR", str(tmp_path_factory.mktemp("pho")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_words(pytestconfig):
    """Models go on with a text for a few tokens, each of which takes as long as a window does."""
    with pytest.MonkeyPatch.context() as patch:
        if not pytestconfig.getoption("--thorough"):
            patch.setattr(writing, "NEW_TOKENS", 8)
        yield


@pytest.fixture
def many_words(monkeypatch):
    """As many as elsewhere: in other processes, say."""
    monkeypatch.setattr(writing, "NEW_TOKENS", NEW_TOKENS)


@contextmanager
def _limited_disk(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def limited_disk():
    """In its context no file may grow beyond so many bytes: a write fails as on a full disk."""
    return _limited_disk


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """What ``datasets`` makes of examples stays in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not bars:
        datasets.enable_progress_bars()


@pytest.fixture
def pretended_gpu():
    """A GPU of 80 GiB that is not there, ``cuda:0``: see tests/pretended/pretended_device.py."""
    with pretend() as cards:
        yield cards[0]


@pytest.fixture
def pretended_gpus():
    """Two GPUs of 80 GiB that are not there, ``cuda:0`` and ``cuda:1``."""
    with pretend(2) as cards:
        yield cards


@pytest.fixture(scope="session")
def new_llama():
    """Makes a random float32 Llama in evaluation mode: 2 blocks, 14 linears, 18,432 weights."""

    def make():
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,  # large enough that tokens differ in loss
            dtype=torch.float32,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def tiny_llama(new_llama):
    return new_llama()


@pytest.fixture
def linears(tiny_llama):
    """The linears of ``tiny_llama``, by name."""
    return prunable_linears(tiny_llama)


@pytest.fixture
def windows():
    """(6, 24), int64: random tokens of ``tiny_llama``."""
    return torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def statistics(tiny_llama, linears, windows):
    """What ``windows`` say about ``linears``, with the full Gram matrices."""
    return gather(
        tiny_llama, linears, windows, fisher_windows=3, projection_rows=0, seed=0
    ).statistics(windows)


WORDS = """
the a model weight row column layer score token window text prune keep remove small large fast
slow search find best first last input output error mean sum norm rank value study
""".split()  # noqa: SIM905 - easier to read than a list


def sentences(count, seed):
    """So many sentences of words that the small tokenizer knows."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(5, 15))) for _ in range(count)]


def small_tokenizer(*, adds_bos):
    """A word-level tokenizer that knows ``WORDS``."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def model_folder(tiny_llama, tmp_path):
    """``tiny_llama`` as a Hugging Face folder, with a tokenizer that adds no BOS."""
    folder = tmp_path / "model"
    tiny_llama.save_pretrained(folder)
    small_tokenizer(adds_bos=False).save_pretrained(folder)
    return folder


@pytest.fixture
def bos_folder(tiny_llama, tmp_path):
    """``tiny_llama`` as a Hugging Face folder, with a tokenizer that adds BOS."""
    folder = tmp_path / "model-bos"
    tiny_llama.save_pretrained(folder)
    small_tokenizer(adds_bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def header_of():
    """Return the header of the model that transformers builds of a configuration."""

    def header(config):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tensors = {
            name: TensorHeader(tuple(p.shape), "BF16") for name, p in model.named_parameters()
        }
        return Header(config=json.loads(config.to_json_string()), tensors=tensors)

    return header


@pytest.fixture(scope="session")
def write_header(header_of):
    """Write a model folder with a configuration, and a file of weights that is a header alone."""

    def write(folder, config):
        header = header_of(config)
        listed = {
            name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [0, 0]}
            for name, tensor in header.tensors.items()
        }
        text = json.dumps(listed).encode()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(header.config))
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    return write


def _write_texts(folder):
    paths = {}
    for seed, name in enumerate(("calibration", "confirmation", "report")):
        paths[name] = folder / f"{name}.jsonl"
        lines = [json.dumps({"text": text}) for text in sentences(80, seed)]
        paths[name].write_text("\n".join(lines) + "\n")
    return paths


@pytest.fixture
def texts(tmp_path):
    """Three .jsonl texts of different documents: calibration, confirmation, report."""
    return _write_texts(tmp_path)


@pytest.fixture(scope="session")
def texts_of_all(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    small_tokenizer(adds_bos=False).save_pretrained(folder / "tokenizer")
    return {**_write_texts(folder), "tokenizer": folder / "tokenizer"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test sees the user's cache, or another test's."""
    cache = tmp_path_factory.getbasetemp() / f"cache-{next(_CACHES)}"
    monkeypatch.setenv("PHO_CACHE_DIR", str(cache))
    return cache


@pytest.fixture(scope="session")
def chromium():
    """The browser of this machine; where there is none, its tests are skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)  # ms; 5 s are not enough beside other work
    with sync_playwright() as playwright:
        # Without its sandbox, as root may start it nowhere else; it sees nothing but our pages.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def postgresql():
    """The URL of an embedded PostgreSQL with a migrated database ``template``."""
    folder = Path(tempfile.mkdtemp(prefix="pho"))  # pytest's own may be too long for a socket
    with embedded_postgresql(folder) as url:
        admin = Database(url)
        # The tests may lose their data, and their databases, of which there are hundreds, are soon
        # left alone.
        server = folder / "postgresql"
        (server / "postgresql.auto.conf").write_text("fsync = off\nautovacuum = off\n")
        os.kill(int((server / "postmaster.pid").read_text().split()[0]), signal.SIGHUP)
        _run_alone(admin, "CREATE DATABASE template")
        template = Database(_named(url, "template"))
        template.migrate()
        template.close()
        yield url
        admin.close()
    # Hundreds of databases are hundreds of thousands of files: nobody waits until they are gone.
    os.posix_spawnp("rm", ["rm", "-rf", str(folder)], os.environ)


@pytest.fixture(scope="session")
def new_database(postgresql):
    """Makes a database, a copy of another one of the server, and gives its URL."""

    def make(template="template"):
        name = f"test_{uuid.uuid4().hex}"
        admin = Database(postgresql, pool=1)
        _run_alone(admin, f"CREATE DATABASE {name} TEMPLATE {template}")
        admin.close()
        return _named(postgresql, name)

    return make


@pytest.fixture
def empty_database(new_database):
    """A fresh database that nothing was ever done to, open."""
    opened = Database(new_database("template1"))  # PostgreSQL's own
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def url_of_file(new_database):
    return new_database()


@pytest.fixture(scope="module")
def shared_database(url_of_file):
    """A migrated database for all tests of a file: to make one takes longer than they do."""
    opened = Database(url_of_file)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def tables(shared_database):
    """All tables but those that say which version they are of."""
    with shared_database.transaction() as connection:
        names = connection.exec_driver_sql(
            "SELECT schemaname || '.' || tablename FROM pg_tables"
            " WHERE schemaname IN ('pho', 'procrastinate', 'optuna')"
        ).scalars()
        return [name for name in names if "version" not in name]


@pytest.fixture
def emptied_database(shared_database, tables):
    """The database of a file, empty."""
    with shared_database.transaction() as connection:
        # Neither triggers nor foreign keys are looked after: all of it goes.
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql("; ".join(f"DELETE FROM {table}" for table in tables))  # noqa: S608 - ours
    return shared_database


@pytest.fixture
def database_url(new_database):
    return new_database()


@pytest.fixture
def database(database_url):
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def store(database):
    return JobStore(database)


def _named(url, name):
    return url.replace("/postgres?", f"/{name}?")


def _run_alone(database, statement):
    """Run what PostgreSQL refuses inside of a transaction."""
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(statement)


@pytest.fixture
def trained(monkeypatch):
    """The blocks that are trained from now on."""
    names = []
    really = Memo.keep

    def keep(self, name, block):
        names.append(name)
        really(self, name, block)

    monkeypatch.setattr(Memo, "keep", keep)
    return names
