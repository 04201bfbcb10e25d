"""Runs notebooks and keeps their outputs: `python -m notebooks.execute [NOTEBOOK...]`.

What belongs to one machine (times, versions of the kernel) is not kept.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

DIRECTORY = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(
    path: Path, parameters: dict[str, Any] | None = None, **options: Any
) -> nbformat.NotebookNode:
    """Runs a notebook in a kernel of its own.

    Args:
      path: the notebook.
      parameters: values that replace those of the cell tagged `parameters`.
      **options: where and how the kernel starts, such as `cwd` and `env`.

    Returns:
      The notebook with its outputs. The file stays as it is.

    Raises:
      CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    lines = [f"{name} = {value!r}" for name, value in (parameters or {}).items()]
    cell.source = "\n".join([cell.source, *lines])
    client = NotebookClient(
        notebook, kernel_name="python3", record_timing=False, coalesce_streams=True
    )
    client.execute(**options)
    for each in notebook.cells:
        if each.cell_type == "code":
            # Alarms of compilers and hints of progress bars tell of the machine, not of the run.
            each.outputs = [o for o in each.outputs if o.get("name") != "stderr"]
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main(arguments: Sequence[str]) -> int:
    """Runs the given notebooks, or all of them, in place; returns the exit code."""
    for path in map(Path, arguments) if arguments else sorted(DIRECTORY.glob("*.ipynb")):
        print(path, flush=True)
        nbformat.write(execute(path, cwd=str(path.parent)), path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
