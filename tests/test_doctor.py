"""`mlpool doctor`: what is missing is said with the line that brings it, and what works wrong, whatever else works."""

import json
import re
import subprocess
import sys

import torch

from mlpool import cli, doctor

# As in an environment with torch alone.
RUN = """
import importlib.metadata, json, sys
from mlpool import cli, doctor
absent = json.loads(sys.argv[1])
for name in absent:
    sys.modules[name.replace("-", "_")] = None
found = doctor.installed
doctor.installed = lambda name: None if name in absent else found(name)
print("exit", cli.main(["doctor"]))
"""


def test_here_all_works(capsys):
    """The environment of the tests has everything but a GPU, perhaps: every kernel and every backend is tried."""
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("all that is needed works\n")
    assert doctor.WRONG not in text
    for what in ("gather", "pool with its gradient", "contrast", "eager", "sdpa"):
        assert re.search(rf"^  ok      {what}\b.*, \d+\.\d s$", text, re.MULTILINE), what
    assert f"torch {doctor.installed('torch')}" in text


def test_with_torch_alone_the_kernels_are_tried_and_the_rest_is_named(tmp_path):
    wanted = {name for extra, names in doctor.requirements().items() if extra for name in names}
    absent = sorted(wanted - {"torch", "triton", "numpy", "typing-extensions", "filelock", "jinja2"})  # torch's own
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(absent)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.endswith("exit 0\n"), done.stdout + done.stderr
    for extra in ("st", "train", "eval"):
        assert f"get it: pip install 'mlpool[{extra}]'" in done.stdout
    assert re.search(r"-       st .*: transformers, .* missing$", done.stdout, re.MULTILINE)
    assert "  ok      contrast" in done.stdout
    assert "tiny Llama" not in done.stdout


def test_an_old_version_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "installed", {"torch": "2.9.1+cpu", "peft": "0.1"}.get)
    found = {f.text.split(" ")[0]: f for f in doctor.packages()}
    assert found["torch"].state == doctor.MISSING
    assert found["torch"].get == "pip install 'torch>=2.11'"
    assert found["train"].state == doctor.MISSING
    assert "peft 0.1 is too old" in found["train"].text
    assert found["eval"].state == doctor.NOTE


def test_requirements_as_installed_are_those_of_the_checkout(monkeypatch, tmp_path):
    here = doctor.requirements()
    assert here[""] == {"torch": "2.11"}
    assert here["st"]["transformers"] == "5.17"
    lines = ["torch>=2.11", 'transformers>=5.17; extra == "st"', 'mlpool[st]; extra == "train"', 'tqdm; extra == "st"']
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "mlpool/doctor.py"))
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    assert doctor.requirements() == {
        "": {"torch": "2.11"}, "st": {"transformers": "5.17", "tqdm": ""}, "train": {},
    }  # fmt: skip


def test_every_command_stands_with_its_extra():
    for name, (_, _, extra) in cli.COMMANDS.items():
        if name != "doctor":
            assert any(re.search(rf"\b{name}\b", doctor.EXTRAS[one]) for one in extra.split(",")), name


def test_a_kernel_that_is_wrong_or_fails_is_said(monkeypatch):
    import mlpool.pooling

    right = mlpool.pooling.gather
    monkeypatch.setattr(mlpool.pooling, "gather", lambda *args, **options: right(*args, **options) * 1.01)
    found = list(doctor.kernels())
    assert [f.state for f in found] == [doctor.WRONG, doctor.OK, doctor.OK]
    assert "error 1e-02" in found[0].text

    def fails(*args, **options):
        raise RuntimeError("no such\n  launch")

    monkeypatch.setattr(mlpool.pooling, "gather", fails)
    failed = next(doctor.kernels())
    assert failed.state == doctor.WRONG
    assert failed.text.endswith("fails: RuntimeError: no such launch")


def test_a_backend_that_reads_padding_is_said(monkeypatch):
    from mlpool import attention

    def unsound(model, expect=None):
        raise attention.AttentionCheckError("padding read?")

    monkeypatch.setattr(attention, "check_attention", unsound)
    states = {f.text.split(" ")[0].rstrip(":"): f for f in doctor.attention()}
    assert states["eager"].state == doctor.WRONG
    assert "padding read?" in states["sdpa"].text


def test_a_compiler_is_needed_with_a_gpu_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for card, state in (("none here", doctor.NOTE), ("", doctor.MISSING)):
        monkeypatch.setattr(doctor, "no_card", lambda card=card: card)
        (found,) = doctor.compiler()
        assert (found.state, found.get) == (state, "apt install gcc")
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (found,) = doctor.compiler()
    assert found.get == f"apt install python3.{sys.version_info.minor}-dev"


def test_a_card_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(doctor, "no_card", lambda: "there is no CUDA GPU")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    found = list(doctor.device())
    assert found[0].state == doctor.MISSING
    assert "pytorch.org" in found[0].get


def test_an_error_of_nan_is_no_ok():
    bad, good = torch.tensor([float("nan")]), torch.tensor([1.0])
    assert not doctor.compared(bad, good, good.double())[0]
    assert doctor.compared(good, good, good.double())[0]
