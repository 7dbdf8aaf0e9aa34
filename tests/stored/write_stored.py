"""
Write what this version of PHO stores into a new folder, for test_stored.py:

    PYTHONPATH=.:benchmarks OMP_NUM_THREADS=1 python tests/stored/write_stored.py tests/stored/0.1.0
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from local_service import service, write_text, write_tiny_model

from pho_service.client import Client
from pho_service.host.files import write_json
from pho_service.spec.job import JobSpec

PHO = [sys.executable, "-c", "from pho_service.cli import main; main()"]
TEXT = (
    "--text text.txt --samples 6 --context-length 32 --projection-rows 16 --rows-per-layer 4 "
    "--kernel-sizes 3,5"
)
CONFIRM = "--confirm-text confirm.txt --finalists 2 --confirm-windows 3"
VERBS = (
    f"calibrate tiny {TEXT} --out bundle.safetensors",
    f"search tiny --pattern 0.5 --preset score {TEXT} {CONFIRM} --trials 20",
    f"prune tiny --config config.json {TEXT} --out pruned",
    f"search tiny --pattern structured:20% {TEXT} {CONFIRM} --out cut.json",
    f"prune tiny --config cut.json {TEXT} --out cut",
)
BACKUP = "backup --data-dir data --out service.dump"


def main(out):
    """Fill a new folder."""
    out.mkdir()
    with tempfile.TemporaryDirectory(prefix="pho-") as temporary:
        folder = Path(temporary)
        spec = JobSpec.model_validate(write_tiny_model(folder))
        write_text(folder / "text.txt")
        write_text(folder / "confirm.txt", seed=1)
        document = spec.model_dump(mode="json")
        write_json(out / "job.json", document)
        for verb in VERBS:
            subprocess.run([*PHO, *verb.split()], cwd=folder, check=True)
        os.chdir(folder)  # where a job's model and text are looked for
        with service(folder, workers=1) as url, Client(url) as client:
            assert client.wait(client.submit(document).id).state == "succeeded"
            subprocess.run([*PHO, *BACKUP.split()], check=True)
        for name in ("bundle.safetensors", "config.json", "pruned/pruning.json", "service.dump"):
            shutil.copy(folder / name, out)
        (out / "cut").mkdir()
        shutil.copy(folder / "cut.json", out / "cut" / "config.json")
        shutil.copy(folder / "cut" / "pruning.json", out / "cut")
        os.chdir(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
