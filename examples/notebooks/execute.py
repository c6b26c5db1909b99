"""Execute the notebooks from top to bottom, each in a kernel of its own, and save them with their outputs.

python examples/notebooks/execute.py
"""

from __future__ import annotations

import base64
import io
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def execute(path: Path, **settings: object) -> NotebookNode:
    """Execute a notebook, and leave its file as it is.

    Args:
        path: of the notebook.
        **settings: values for names that the first code cell sets, instead of those that it gives them.

    Returns:
        The notebook with its outputs, tidied up.

    Raises:
        ValueError: if the first code cell does not set one of the names.
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in settings.items():
        first.source, found = re.subn(rf"^{name} = .*", f"{name} = {value!r}", first.source, flags=re.MULTILINE)
        if not found:
            raise ValueError(f"The first code cell of {path.name} has no line `{name} = ...`.")
    client = NotebookClient(
        notebook,
        timeout=600,
        coalesce_streams=True,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        # Kernels warn that they are reached over TCP, on this machine.
        extra_arguments=["--log-level=ERROR"],
    )
    # The package of this checkout, whichever is installed.
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    return tidy(notebook)


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Remove from a notebook what differs between machines and runs without being a result."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = NotebookNode()  # when each cell ran
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(tidy_output, cell.outputs) if output.get("text") != ""]
    return notebook


def tidy_output(output: NotebookNode) -> NotebookNode:
    """Keep what PowerSGD says of all messages and warnings, which come on stderr, and make pictures small."""
    if output.get("name") == "stderr":
        output.text = "".join(line for line in output.text.splitlines(keepends=True) if "PowerSGD" in line)
    if "image/png" in output.get("data", {}):
        picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        smaller = io.BytesIO()
        picture.quantize(64).save(smaller, "png", optimize=True)
        output.data["image/png"] = base64.b64encode(smaller.getvalue()).decode()
    return output


def main() -> None:
    """Execute all notebooks, and save them."""
    for path in NOTEBOOKS:
        print(path.name)
        nbformat.write(execute(path), path)


if __name__ == "__main__":
    main()
