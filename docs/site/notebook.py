"""
Run docs/tutorial.ipynb in a new folder, and keep what its cells give:

    OMP_NUM_THREADS=1 python docs/site/notebook.py

The cells are plain Python, run one after the other in one namespace; a kernel of Jupyter would take
a dozen packages more.
"""

import ast
import json
import os
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "tutorial.ipynb"


def main() -> None:
    """Put the outputs into the file."""
    document = json.loads(NOTEBOOK.read_text())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        outputs = iter(run(document))
        os.chdir("/")
    for number, cell in enumerate(code_cells(document), 1):
        text = next(outputs)
        cell["execution_count"] = number
        stream = {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}
        cell["outputs"] = [stream] if text else []
    NOTEBOOK.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def code_cells(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that are run."""
    return [cell for cell in document["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict[str, Any]) -> str:
    """What a cell gave when the file was written."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


def run(document: dict[str, Any]) -> list[str]:
    """Run all cells in the current folder, and give what each prints and ends with."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for number, cell in enumerate(code_cells(document), 1):
        tree = ast.parse("".join(cell["source"]), f"cell {number}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with redirect_stdout(StringIO()) as printed:
            exec(compile(tree, f"cell {number}", "exec"), namespace)  # noqa: S102 - our own
            if isinstance(last, ast.Expr):
                value = eval(  # noqa: S307 - our own
                    compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace
                )
                if value is not None:
                    print(repr(value))  # noqa: T201 - as a notebook does
        found.append(printed.getvalue())
    return found


if __name__ == "__main__":
    main()
