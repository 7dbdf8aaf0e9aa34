"""
Counts the product's lines and files, and fails above the budget in pyproject.toml.

    python .ci/budget.py

Growth is a decision: whoever needs more lines or files raises `[tool.budget]`, in a line of the
diff that says why.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pho_service", "storage", "workers")


def main() -> None:
    """Print the counts beside the budget; exit with 1 if one is above it."""
    budget = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["budget"]
    known = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    listed = subprocess.run(
        [*known, *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    paths = (ROOT / name for name in listed.split("\0") if name.endswith(".py"))
    lines = {path: path.read_bytes().count(b"\n") for path in paths if path.is_file()}
    longest = max(lines, key=lines.__getitem__)
    found = {"lines": sum(lines.values()), "files": len(lines), "longest": lines[longest]}
    for name, count in found.items():
        print(f"product {name}: {count:,} of {budget[name]:,}")
    above = [name for name, count in found.items() if count > budget[name]]
    if above:
        sys.exit(
            f"The product is above its budget of {', '.join(above)} (the longest file is "
            f"{longest.relative_to(ROOT)}). Remove what nobody needs, or raise [tool.budget] in "
            "pyproject.toml and say why."
        )


if __name__ == "__main__":
    main()
