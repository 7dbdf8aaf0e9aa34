"""The tutorial works by copy and paste: its commands are run as they stand, in one shell."""

import difflib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
PATIENCE_S = 900  # of the whole page

# The installation is in a block of ```bash: whoever runs the tests has done it.
BLOCKS = re.findall(
    r"^```sh\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?",
    TUTORIAL.read_text(),
    re.MULTILINE | re.DOTALL,
)
END = "--- end of block"
STOP = "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"  # the service, where a command fails


@pytest.fixture
def folder():
    """An empty one, with a short name: a PostgreSQL's socket lies in it, and its user enters it."""
    path = Path(tempfile.mkdtemp(prefix="pho"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def shell(folder):
    """A shell in the folder that knows `pho`, with a port and a data folder that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (folder / "here").mkdir()
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PHO_")} | {
        "OMP_NUM_THREADS": "1",  # the model is too small for more, and other tests may run
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PHO_API_URL": f"http://127.0.0.1:{port}",
        "PHO_CACHE_DIR": str(folder / "cache"),
        "PHO_DATA_DIR": str(folder / "data"),
        "PHO_PORT": str(port),
    }
    return subprocess.Popen(
        ["bash", "-e"],
        cwd=folder / "here",
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.thorough
def test_every_command_of_the_page_succeeds_and_prints_what_the_page_shows(folder):
    script = f"{STOP}\n" + "".join(f"{commands}echo '{END}'\n" for commands, _ in BLOCKS)
    with shell(folder) as process:
        try:
            printed, error = process.communicate(script, timeout=PATIENCE_S)
        finally:
            if process.poll() is None:  # it took too long
                os.killpg(process.pid, signal.SIGKILL)
    outputs = printed.split(f"{END}\n")

    assert process.returncode == 0, f"{outputs[-1]}\n{error[-4000:]}"
    assert len(outputs) == len(BLOCKS) + 1
    others = [
        "\n".join(
            difflib.unified_diff(shown.splitlines(), output.splitlines(), commands, "printed")
        )
        for (commands, shown), output in zip(BLOCKS, outputs[:-1], strict=True)
        if not same(shown, output)
    ]
    assert not others, "\n\n".join(others)
    rise = re.search(r"(\S+) ± \S+% above dense", outputs[1])
    assert rise, outputs[1]
    assert float(rise[1]) > 10  # the example loses what one can see


def same(shown, printed):
    """Compare what is shown with what was printed: any fraction will do, ``...`` is anything."""
    wanted, got = (re.sub(r"[+-]?\d+\.\d+(e-\d+)?", "0.0", text) for text in (shown, printed))
    return not shown or OutputChecker().check_output(wanted, got, ELLIPSIS | NORMALIZE_WHITESPACE)
