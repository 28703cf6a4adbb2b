"""The notebooks as they are committed: made from their scripts, run through, with nothing of one machine in them."""

from __future__ import annotations

import json
import re

import notebooks
import pytest
import yaml
from docs_blocks import ROOT

FOLDER = ROOT / "docs/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.name for path in NOTEBOOKS]


def test_every_script_has_its_notebook_and_its_place():
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert names == {path.stem for path in NOTEBOOKS}
    text = re.sub(r"!!?python\S*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf8"))
    (listed,) = (entry["Notebooks"] for entry in yaml.safe_load(text)["nav"] if "Notebooks" in entry)
    assert listed == [f"notebooks/{name}.md" for name in sorted(names)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebooks_are_fit_to_be_shown(path):
    assert notebooks.faults(path) == []
    text = path.read_text(encoding="utf8")
    assert "claims" not in text
    assert len(text) < 500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_the_page_has_every_cell_and_plot(path):
    page, pictures = notebooks.page(path)
    assert page.startswith("# ")
    found = notebooks.read(path)
    assert page.count("```python\n") == sum(cell["cell_type"] == "code" for cell in found)
    assert set(re.findall(r"!\[output\]\((.*?)\)", page)) == set(pictures)
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())
    for target in re.findall(r"\]\(([^):]+)\)", page):
        assert target in pictures or (FOLDER / target).exists(), target


WRONG = {
    "stderr": {"output_type": "stream", "name": "stderr", "text": "a warning\n"},
    "ValueError": {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []},
    "text/html": {"output_type": "display_data", "data": {"text/html": "<b>"}, "metadata": {}},
    "at most": {"output_type": "stream", "name": "stdout", "text": ["a line\n"] * 99},
    "progress bar": {"output_type": "stream", "name": "stdout", "text": "1%\r2%\r"},
    "place of the machine": {"output_type": "stream", "name": "stdout", "text": "saved to /home/me/runs"},
}


@pytest.mark.parametrize("fault", [*WRONG, "not those of", "first cell to its last"])
def test_faults_are_seen(fault, tmp_path):
    script = '# %% [markdown]\n# # A title\n\n# %%\nprint(1)\n\n# %% tags=["claims"]\nassert True\n'
    (tmp_path / "one.py").write_text(script)
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "runs/one, 1/2\n"},
        *filter(None, [WRONG.get(fault)]),
    ]
    source = "print(2)" if fault == "not those of" else "print(1)"
    count = 7 if "first" in fault else 1
    made = [
        {"cell_type": "markdown", "source": ["# A title"], "metadata": {}},
        {"cell_type": "code", "source": source, "execution_count": count, "outputs": outputs, "metadata": {}},
    ]
    path = tmp_path / "one.ipynb"
    path.write_text(json.dumps({"cells": made}))
    (found,) = notebooks.faults(path)
    assert fault in found


def test_a_script_without_a_first_cell_is_refused():
    with pytest.raises(ValueError, match="begins with a cell"):
        notebooks.cells("import json\n# %%\n")
    with pytest.raises(ValueError, match="begins with a cell"):
        notebooks.cells("")


def test_new_text_keeps_the_outputs_and_new_code_does_not(tmp_path):
    path = tmp_path / NAMES[0]
    script = path.with_suffix(".py")
    path.write_text(NOTEBOOKS[0].read_text(encoding="utf8"))
    text = NOTEBOOKS[0].with_suffix(".py").read_text(encoding="utf8")
    script.write_text(text)
    notebooks.reword(script)
    assert path.read_text(encoding="utf8") == NOTEBOOKS[0].read_text(encoding="utf8")
    script.write_text(text.replace("# # ", "# # Other: ", 1))
    notebooks.reword(script)
    assert notebooks.faults(path) == []
    assert notebooks.read(path)[0]["source"].startswith("# Other: ")
    script.write_text(text + "\n# %%\nprint()\n")
    with pytest.raises(SystemExit, match="run it"):
        notebooks.reword(script)
