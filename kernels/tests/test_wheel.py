"""The wheel `mlpool-kernels` as it is installed here, beside torch alone: `make test-kernels`."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USE = """
import sys, torch, mlpool_kernels as k
torch.manual_seed(0)
states = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
where = [torch.tensor(x) for x in ([0, 3], [3, 6], [2, 4], [3, 2])]
keep = torch.tensor([True] * 5 + [False])
rows = k.gather(states, *where, keep, True)
truth = torch.stack([torch.stack([s[0].mean(0), s[1, :2].mean(0)]) for s in states], 1)
assert torch.allclose(rows, truth, atol=1e-6), (rows, truth)
rows.sum().backward()
assert torch.allclose(states[0].grad[1, :, 0], torch.tensor([0.5, 0.5, 0.0]))
try:
    k.gather(states, *where, keep, True, backend="triton")
except (ModuleNotFoundError, ValueError) as error:
    print(type(error).__name__, error)
print(k.__file__)
print(sorted(name for name in sys.modules if name in ("triton", "numpy", "transformers", "mlpool")))
"""


def test_it_imports_and_computes_with_torch_alone(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    error, file, others = done.stdout.splitlines()
    assert not Path(file).is_relative_to(ROOT / "kernels"), "the wheel is not what was imported"
    assert others == "[]"
    if importlib.util.find_spec("triton") is None:
        assert error.startswith('ModuleNotFoundError backend="triton" needs Triton: pip install')


def test_its_version_is_mlpools_and_it_needs_torch_alone():
    text = (ROOT / "mlpool/version.py").read_text()
    assert importlib.metadata.version("mlpool-kernels") == re.search(r'__version__ = "(.+)"', text)[1]
    needs = importlib.metadata.requires("mlpool-kernels")
    assert [line for line in needs if "extra ==" not in line] == ["torch>=2.11"]


def test_it_holds_every_source_and_the_licence():
    files = {path.name: path.locate() for path in importlib.metadata.files("mlpool-kernels")}
    sources = {path.name: path for path in (ROOT / "kernels/mlpool_kernels").glob("*.py")}
    assert {name for name in files if name.endswith(".py")} == sources.keys()
    assert [name for name, path in sources.items() if files[name].read_bytes() != path.read_bytes()] == []
    assert {"py.typed", "LICENSE"} <= files.keys()
