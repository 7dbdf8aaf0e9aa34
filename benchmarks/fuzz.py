"""
Properties and readers on far more examples than the tests take: `make fuzz`.

Runs tests/test_fuzzing.py and tests/pruning/test_properties.py again and again with other
seeds until the time is over, or something fails. Prints the seed, which repeats a failure:
`pytest --hypothesis-profile=fuzz --hypothesis-seed=SEED FILE`. Arguments: seconds, first seed.
"""

import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from machine import conditions, software

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_fuzzing.py", "tests/pruning/test_properties.py")


def main(seconds: int = 600, seed: int = 0) -> int:
    """Fuzz; 1 if something was found."""
    print(f"{conditions()}; {software('hypothesis', 'torch', 'safetensors', 'gguf')}")
    began, examples = time.monotonic(), 0
    while True:
        command = [
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
            "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}",
            "--hypothesis-show-statistics", *TESTS,
        ]  # fmt: skip
        ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        counts = re.findall(r"- (\d+) passing(?: examples)?, (\d+) failing", ended.stdout)
        examples += sum(int(passing) + int(failing) for passing, failing in counts)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
        took = time.monotonic() - began
        print(f"seed {seed}: {examples} examples, {took:.0f} s, {peak:.0f} MiB at the peak")
        if ended.returncode:
            print(ended.stdout[-10_000:], ended.stderr[-10_000:], sep="\n")
            return 1
        if took > seconds:
            return 0
        seed += 1


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
