"""An old sentence-transformers is refused by name and version, before any of it is imported."""

import subprocess
import sys

import pytest

from mlpool.embedder import requirements


@pytest.mark.parametrize("version", ["5.4.1", "6.0.1", "6.1.9"])
def test_a_version_without_our_hook_is_refused(monkeypatch, version):
    monkeypatch.setattr(requirements, "version", {"sentence-transformers": version}.__getitem__)
    with pytest.raises(ImportError, match=rf"sentence-transformers {version} is too old.*sentence-transformers>=6\.2"):
        requirements.require_sentence_transformers()


@pytest.mark.parametrize("version", ["6.2.0", "6.10.1", "7.0.0.dev0"])
def test_later_versions_are_taken(monkeypatch, version):
    monkeypatch.setattr(requirements, "version", {"sentence-transformers": version}.__getitem__)
    requirements.require_sentence_transformers()


def test_the_import_of_embedders_refuses_first():
    program = (
        "import importlib.metadata, sys\n"
        "importlib.metadata.version = lambda name: '6.0.1'\n"
        "import mlpool\n"
        "try:\n"
        "    mlpool.load\n"
        "except ImportError as error:\n"
        "    print(error, 'sentence_transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "sentence-transformers 6.0.1 is too old" in done.stdout, done.stderr
    assert done.stdout.endswith("False\n")
