"""Run the notebooks and store what they print and draw in their .ipynb files.

    python -m notebooks.refresh           # all of them, or those that are named: 2_what_a_path_kernel_is

The .py files are the source. The .ipynb files hold the same cells, their outputs, and a digest of the cells that these
outputs are of; nothing in them depends on the time or the folder. Pictures are stored in 256 colours.
"""

import base64
import hashlib
import io
import json
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat
from PIL import Image

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(file.stem for file in FOLDER.glob("[0-9]*.py"))


def digest(notebook) -> str:
    """The SHA-256 of the notebook's code cells."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def run(notebook):
    """Run every cell in a kernel of its own, and keep of the outputs what the code alone decides."""
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False,
                            coalesce_streams=True).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"a cell writes to the standard error, which would be stored:\n{cell.source}\n\n"
                                   f"{output.text}")
            if picture := output.get("data", {}).get("image/png"):
                output.data["image/png"] = in_256_colours(picture)
                output.metadata = {}
    return notebook


def in_256_colours(picture: str) -> str:
    """A PNG file in base64 that takes a third of the bytes and holds no metadata."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        reduced = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    file = io.BytesIO()
    reduced.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def refreshed(name: str):
    """The notebook with its outputs, as it is stored."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for cell in notebook.cells:
        cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        cell.metadata.pop("lines_to_next_cell", None)          # blank lines of the .py
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}, "pkjax": {"outputs_of": digest(notebook)}})
    stored = nbformat.from_dict(notebook.metadata)
    run(notebook)
    notebook.metadata = stored                # the kernel adds its versions
    return notebook


def main(names: list[str]) -> None:
    """Refresh the notebooks of these names, or all."""
    if unknown := set(names) - set(NAMES):
        raise SystemExit(f"no notebook is named {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    for name in names or NAMES:
        file = FOLDER / f"{name}.ipynb"
        nbformat.write(refreshed(name), file)
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
