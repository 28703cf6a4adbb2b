"""The command: help and what a user mistyped are answered at once, without importing what embeds."""

import json
import re
import subprocess
import sys

import pytest

from mlpool import cli, options

HEAVY = ("transformers", "sentence_transformers", "mteb", "datasets", "peft", "torch")
# What the extras bring.
ABSENT = (
    "transformers", "sentence_transformers", "tokenizers", "safetensors", "numpy", "tqdm", "pydantic", "yaml",
    "filelock", "peft", "accelerate", "datasets", "pyarrow", "mteb", "scipy", "matplotlib", "jinja2",
)  # fmt: skip
# Each command with a path that is not there, and what the error says of it.
MISSING = {
    "init": ["./none", "none.jsonl", "-o", "out.yaml"],
    "encode": ["none.txt", "-m", ".", "-o", "out"],
    "calibrate": ["none.txt", "-m", ".", "-o", "out"],
    "mine": ["none.jsonl", "-m", ".", "-o", "out.jsonl"],
    "train": ["none.yaml"],
    "fit": ["none.yaml"],
    "merge": ["./none", "-o", "out"],
    "export": ["./none", "-o", "out"],
    "import-released": ["./none", "-o", "out", "--base", "."],
    "eval": ["./none", "--tasks", "STSBenchmark"],
    "compare": ["none"],
    "layers": ["./none", "--texts", "none.txt"],
    "study": ["none.yaml"],
}
RUN = """
import contextlib, io, json, sys
from mlpool import cli
for name in json.loads(sys.argv[3]):
    sys.modules[name] = None  # importing it is an error, as where it is not installed
said = {}
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
    said[" ".join(words)] = [code, out.getvalue(), sorted(set(json.loads(sys.argv[2])) & set(sys.modules))]
print(json.dumps(said))
"""


def said(*commands: list[str], cwd, without: tuple[str, ...] = ()) -> dict[str, list]:
    """In one fresh process: exit code, what was printed, and what had been imported by then."""
    arguments = [sys.executable, "-c", RUN, *map(json.dumps, (commands, HEAVY, without))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=cwd)
    return json.loads(done.stdout)


def test_help_imports_nothing(tmp_path):
    found = said(["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS), cwd=tmp_path)
    assert len(found) == len(cli.COMMANDS) + 2
    for words, (code, text, imported) in found.items():
        assert (code, imported) == (0, []), words
        assert text.startswith(("usage: mlpool", "mlpool 0"))


def test_a_missing_file_is_said_before_anything_is_imported(tmp_path):
    assert MISSING.keys() == cli.COMMANDS.keys() - {"doctor"}  # which is given nothing
    for words, (code, text, imported) in said(*([k, *v] for k, v in MISSING.items()), cwd=tmp_path).items():
        assert code == 2, (words, text)
        assert text.startswith("mlpool: error: ")
        assert "none" in text
        assert imported == [], f"{words} imports {imported} before it says: {text}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x", "cuda:99", "meta", "", "cpu:x"])
@pytest.mark.parametrize("command", ["encode", "mine", "merge", "export", "import-released", "eval", "layers"])
def test_a_device_that_is_not_there(name, command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *MISSING[command], f"--device={name}"])
    assert stop.value.code == 2
    assert f"{name!r} is no device here" in capsys.readouterr().err


def test_lengths_and_types_are_checked(capsys):
    for flag, value in (("--max-seq-length", "0"), ("--max-seq-length", "x"), ("--dtype", "float31")):
        for command in ("merge", "import-released", "eval", "layers", "encode", "mine"):
            if (command == "merge" and "length" in flag) or (command in ("encode", "mine") and flag == "--dtype"):
                continue  # encode's is of what it writes, mine has none
            with pytest.raises(SystemExit):
                cli.main([command, *MISSING[command], flag, value])
            assert repr(value) in capsys.readouterr().err


def test_check_place(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "file").touch()
    options.check_place(str(tmp_path / "model"))
    options.check_place("owner/on-the-hub")
    with pytest.raises(FileNotFoundError, match=r"near it: model"):
        options.check_place(str(tmp_path / "modle"))
    with pytest.raises(NotADirectoryError, match="is a file"):
        options.check_place(str(tmp_path / "file"))
    for name in ("", "a\0b"):
        with pytest.raises(ValueError, match="is no name of a model"):
            options.check_place(name)


def test_what_to_install_is_said(tmp_path):
    """With torch alone every command ends with the line that mends it, and nothing is written."""
    (tmp_path / "x.txt").write_text("a text")
    (tmp_path / "x.yaml").write_text("model: .\n")
    (tmp_path / "x.csv").write_text("model,task,task_type,score\na,b,STS,0.5\nc,b,STS,0.6\n")
    there = {
        "init": [".", "x.csv", "-o", "out.yaml"],
        "encode": ["x.txt", "-m", ".", "-o", "out"],
        "calibrate": ["x.txt", "-m", ".", "-o", "out"],
        "mine": ["x.csv", "-m", ".", "-o", "out.jsonl"],
        "train": ["x.yaml"],
        "fit": ["x.yaml"],
        "merge": [".", "-o", "out"],
        "export": [".", "-o", "out"],
        "import-released": [".", "-o", "out", "--base", "."],
        "eval": [".", "--tasks", "STSBenchmark", "-o", "out"],
        "compare": ["x.csv"],
        "layers": [".", "--texts", "x.txt"],
        "study": ["x.yaml", "-o", "out"],
    }
    assert there.keys() == cli.COMMANDS.keys() - {"doctor"}  # which says so line by line
    before = sorted(tmp_path.iterdir())
    for words, (code, text, _) in said(*([k, *v] for k, v in there.items()), cwd=tmp_path, without=ABSENT).items():
        assert code == 2, (words, text)
        last = text.splitlines()[-1]  # torch itself warns of numpy before
        assert re.fullmatch(r"mlpool: error: .*: pip install 'mlpool\[\w+(,\w+)?\]'", last), (words, text)
    assert sorted(tmp_path.iterdir()) == before
