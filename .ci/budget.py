"""
Counts the product's lines and files, and fails above the budget in pyproject.toml.

    python .ci/budget.py

Growth is a decision: whoever needs more lines or files raises `[tool.budget]`, in a line of the
diff that says why. Lines are counted in steps of 250, so that two changes rarely edit that line.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pho_service", "storage", "workers")
STEP = 250  # lines


def main() -> None:
    """Print the counts beside the budget; exit with 1 if one is above it."""
    budget = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["budget"]
    if budget["lines"] % STEP:
        sys.exit(f"lines = {budget['lines']} in [tool.budget] is not a multiple of {STEP}.")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    listed = subprocess.run(
        [*command, *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    paths = (ROOT / name for name in listed.split("\0") if name.endswith(".py"))
    lines = {path: path.read_bytes().count(b"\n") for path in paths if path.is_file()}
    longest = max(lines, key=lines.__getitem__)
    counts = {"lines": sum(lines.values()), "files": len(lines), "longest": lines[longest]}
    for name, count in counts.items():
        print(f"product {name}: {count:,} of {budget[name]:,}")
    above = [name for name, count in counts.items() if count > budget[name]]
    if above:
        sys.exit(
            f"The product is above its budget of {', '.join(above)} (the longest file is "
            f"{longest.relative_to(ROOT)}). Remove what nobody needs, or raise [tool.budget] in "
            "pyproject.toml and say why."
        )


if __name__ == "__main__":
    main()
