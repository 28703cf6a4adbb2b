"""The notebooks of docs/notebooks: a .py in the percent format, which is edited, and the .ipynb that running it makes.

    python docs/site/notebooks.py run docs/notebooks/1-search.py      execute, and write the .ipynb with its outputs
    python docs/site/notebooks.py check docs/notebooks/1-search.py    execute, and write nothing
    python docs/site/notebooks.py reword docs/notebooks/1-search.py   put new text into the .ipynb; its outputs stay

A cell tagged "claims" holds what the text of a notebook says as assertions: it is executed, and is not in the .ipynb.
For the site a notebook becomes a page of Markdown with its plots as files beside it (hooks.py), with nothing that a
reader's browser would have to load from elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HEAD = re.compile(r"^# %%(?P<markdown> \[markdown\])?(?: tags=(?P<tags>\[.*\]))?$", re.MULTILINE)
LONGEST = 60  # lines of one output
PLACES = re.compile(r"(?<![\w.])/(?:home|work|root|tmp|opt|usr|mnt|Users|private)/|site-packages")
# Of the kernel that makes the outputs: no bars, no word of a hub that is not asked.
QUIET = {
    "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


class Cell(NamedTuple):
    kind: str  # code or markdown
    source: str
    claims: bool


def cells(script: str) -> list[Cell]:
    """The cells of a script in the percent format, in their order."""
    heads = [*HEAD.finditer(script)]
    if not heads or script[: heads[0].start()].strip():
        raise ValueError("a notebook's script begins with a cell: # %%")
    ends = [head.start() for head in heads[1:]] + [len(script)]
    return [_cell(head, script[head.end() : end].strip("\n")) for head, end in zip(heads, ends, strict=True)]


def _cell(head: re.Match[str], body: str) -> Cell:
    if head["markdown"]:
        return Cell("markdown", re.sub(r"^# ?", "", body, flags=re.MULTILINE), False)
    return Cell("code", body, "claims" in json.loads(head["tags"] or "[]"))


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of an .ipynb, sources and texts as one string each."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": _joined(cell["source"])} for cell in found]


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


# --- what is wrong with one -------------------------------------------------------------------------------------------


def faults(path: Path) -> list[str]:
    """What keeps an .ipynb from being shown: behind its script, not run through, or with outputs of one machine."""
    found, script = read(path), path.with_suffix(".py")
    wanted = [(cell.kind, cell.source) for cell in cells(script.read_text(encoding="utf-8")) if not cell.claims]
    wrong = []
    if [(cell["cell_type"], cell["source"]) for cell in found] != wanted:
        wrong.append(f"its cells are not those of {script.name}: make notebooks")
    code = [cell for cell in found if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in code] != [*range(1, len(code) + 1)]:
        wrong.append("it was not run from its first cell to its last")
    for number, cell in enumerate(code, 1):
        for output in cell["outputs"]:
            wrong += [f"cell {number}: {fault}" for fault in _faults(output)]
    return wrong


def _faults(output: dict[str, Any]) -> Iterator[str]:
    if output["output_type"] == "error" or output.get("name") == "stderr":
        yield f"an output is {output.get('ename') or output['name']}"
    if others := set(output.get("data", {})) - {"text/plain", "image/png"}:
        yield f"an output is {', '.join(sorted(others))}; a page shows text/plain and image/png"
    text = _text(output)
    if text.count("\n") > LONGEST:
        yield f"an output has {text.count(chr(10))} lines, at most {LONGEST}"
    if "\r" in text or "\x1b" in text:
        yield "an output has a progress bar or colours of a terminal"
    if found := PLACES.search(text) or re.search(rf"\b{re.escape(socket.gethostname())}\b", text):
        yield f"an output names a place of the machine it was run on: {found[0]}"


def _text(output: dict[str, Any]) -> str:
    """What an output says, nothing where it is a picture."""
    data = output.get("data", {})
    return "" if "image/png" in data else _joined(output.get("text") or data.get("text/plain") or "")


# --- the page of a site -----------------------------------------------------------------------------------------------


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their names."""
    parts, pictures = [], {}
    for cell in read(path):
        if cell["cell_type"] == "markdown":
            parts.append(cell["source"])
            continue
        parts.append(f"```python\n{cell['source']}\n```")
        for output in cell["outputs"]:
            if picture := output.get("data", {}).get("image/png"):
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(_joined(picture))
                parts.append(f"![output]({name})")
            elif text := _text(output).rstrip("\n"):
                parts.append(f"``` {{ .text .output }}\n{text}\n```")
    heading, _, text = parts[0].partition("\n")
    download = f'<a href="{path.name}" download>The notebook as a file</a>'
    return "\n\n".join([heading, download, text.strip(), *parts[1:]]) + "\n", pictures


# --- running ----------------------------------------------------------------------------------------------------------


def execute(script: Path) -> Any:
    """A notebook, run by this Python in an empty folder, which stands as deep as its own: results that an earlier run
    left would be compared with these. Raises SystemExit where a cell fails, with what the others said."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    os.environ.update(QUIET)
    new = {"code": new_code_cell, "markdown": new_markdown_cell}
    made = [
        new[cell.kind](cell.source, metadata={"claims": cell.claims})
        for cell in cells(script.read_text(encoding="utf-8"))
    ]
    notebook = new_notebook(cells=made, metadata={"kernelspec": KERNEL})
    folder = script.parents[2] / "build" / script.stem
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "runs").mkdir(parents=True)
    place = {"metadata": {"path": folder}}
    try:
        NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=place).execute()
    except CellExecutionError as error:
        said = "".join(_text(output) for cell in made for output in cell.get("outputs", ()))
        raise SystemExit(f"{said}\n{script}: {error}") from None
    return notebook


KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def publish(notebook: Any, path: Path) -> None:
    """Write it without claims, times and warnings; pieces of one output put together."""
    import nbformat

    notebook.cells = [cell for cell in notebook.cells if not cell.metadata.pop("claims")]
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count, cell.metadata, kept = number, {}, []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                continue
            if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
            if "execution_count" in output:
                output.execution_count = number
            kept.append(output)
        cell.outputs = kept
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number}"  # by place: a random one would change with every run
    notebook.metadata.language_info = {"name": "python"}
    _write(path, json.loads(nbformat.writes(notebook)))


def reword(script: Path) -> None:
    """Put a script's text into its .ipynb, whose outputs stay. Raises SystemExit where the code is another."""
    path = script.with_suffix(".ipynb")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    wanted = [cell for cell in cells(script.read_text(encoding="utf-8")) if not cell.claims]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if [_joined(cell["source"]) for cell in code] != [cell.source for cell in wanted if cell.kind == "code"]:
        raise SystemExit(f"the code of {script} is not that of {path.name}: run it")
    ran, made = iter(code), []
    for number, cell in enumerate(wanted, 1):
        text = {"cell_type": "markdown", "metadata": {}, "source": cell.source.splitlines(keepends=True)}
        made.append({**(next(ran) if cell.kind == "code" else text), "id": f"cell-{number}"})
    notebook["cells"] = made
    _write(path, notebook)


def _write(path: Path, notebook: dict[str, Any]) -> None:
    """As Jupyter lays it out."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "check", "reword"))
    parser.add_argument("scripts", nargs="+", type=Path, metavar="NOTEBOOK.py")
    args = parser.parse_args()
    for script in args.scripts:
        if args.what == "reword":
            reword(script)
            continue
        began = time.perf_counter()
        notebook = execute(script.resolve())
        if args.what == "run":
            publish(notebook, script.with_suffix(".ipynb"))
            if wrong := faults(script.with_suffix(".ipynb")):
                raise SystemExit(f"{script.with_suffix('.ipynb')}: {'; '.join(wrong)}")
        print(f"{script}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
