"""Tries `bidirectional`, `causal`, `pack` and `Taps` on every text family of the installed transformers.

    python tests/census/census.py                      # all; a CSV grows row by row, and a later call goes on with it
    python tests/census/census.py --only llama,qwen3   # these, whatever the CSV holds
    python tests/census/census.py --tables             # the tables of docs/ from the CSV

What this package says of a model is not believed: a probe that shares no code with the self-test runs every layer
again on its own input and asks autograd (where a backend has no backward, finite changes) which tokens reach which. A
row is

    works            both ways in every layer, padded texts equal lone ones, packed ones equal padded ones
    encoder          so by itself; nothing was changed
    refused          with an error of this package's own, and the probe does not find the model sound
    no model         the library has no such backend, needs a package, or the rules of families.py do not fit
    unclear error    an error from elsewhere
    silently wrong   accepted, and the probe finds otherwise
    false refusal    refused by the self-test, and the probe finds it sound

and the last three are to be 0. Taps and `causal()` after a reload are tried beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import inspect
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from families import VOCABULARY, build, families
from torch import Tensor, nn

from mlpool.attention import AttentionCheckError, bidirectional, causal, pack, unpack
from mlpool.taps import Taps, find_layers

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "census.csv"
BACKENDS = ("eager", "sdpa", "flex_attention", "packed")
FAULTS = ("unclear error", "silently wrong", "false refusal")
LIMIT = 240  # seconds for one row
LENGTHS = (8, 5, 5)  # of the probe's texts: whole, padded right, padded left
PACKED_LENGTHS = (90, 6, 1)  # one of them longer than every window and chunk


@dataclass
class Row:
    """One line of the CSV. reason: of the outcome; taps, reload, causal_packed: "ok", "", or what happened."""

    family: str
    backend: str
    outcome: str = ""
    reason: str = ""
    taps: str = ""
    reload: str = ""
    causal_packed: str = ""
    transformers: str = transformers.__version__
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        return [part for part in (self.outcome, self.taps, self.reload, self.causal_packed) if part.startswith(FAULTS)]


# --- one row ----------------------------------------------------------------------------------------------------------


def examine(family: str, backend: str) -> Row:
    """Build the tiny model of a family and try everything on it."""
    row, start = Row(family, backend), time.time()
    try:
        with _limited(), torch.compiler.set_stance("force_eager"):  # compiling flex takes half a minute on a CPU
            _examine(row)
    except Exception as error:
        row.outcome, row.reason = "unclear error", _said(error)
    row.seconds = round(time.time() - start, 1)
    return row


def _examine(row: Row) -> None:
    attempt = [row.backend] if row.backend != "packed" else ["sdpa", "eager"]
    for implementation in attempt:
        try:
            model = build(row.family, implementation)
            break
        except Exception as error:
            row.outcome, row.reason = "no model", _said(error)
    else:
        return
    try:
        before = _states(model, _padded(LENGTHS))
    except Exception:  # it needs images, or the backend cannot run it
        before = None
    if row.backend == "packed":
        _packed(row, model)
        return
    row.outcome, row.reason = _both_ways(model)
    if row.backend == "eager" and before is not None:
        row.taps = _taps(model)
    if row.outcome == "works" and row.backend == "eager" and before is not None:
        row.reload = _reloaded(model, row.backend, before)


def _both_ways(model: nn.Module) -> tuple[str, str]:
    try:
        bidirectional(model)
    except Exception as error:
        if not _own(error):
            return "unclear error", _said(error)
        if isinstance(error, AttentionCheckError) and "is not sound" in str(error) and _forced(model):
            return "false refusal", _said(error)
        return "refused", _said(error)
    encoder = "forward" not in vars(find_layers(model)[0])
    if problem := _unsound(model, encoder):
        return "silently wrong", problem
    return ("encoder" if encoder else "works"), ""


def _forced(model: nn.Module) -> bool:
    """Whether the probe finds a model sound that the self-test refused."""
    try:
        bidirectional(model, check=False)
        return not _unsound(model)
    except Exception:
        return False
    finally:
        with contextlib.suppress(ValueError):  # an encoder
            causal(model)


def _packed(row: Row, model: nn.Module) -> None:
    """Packed both ways where the model can be so, and causal."""
    if _packs_causal(model, row):
        return
    row.outcome, row.reason = _both_ways(model)
    if row.outcome in ("works", "encoder"):
        said = _same_packed(model)
        row.outcome, row.reason = (row.outcome, "") if said == "ok" else _split(said)


def _packs_causal(model: nn.Module, row: Row) -> bool:
    """Try it as it was built; True where the row is done."""
    said = _same_packed(model)
    row.causal_packed = said
    if said.startswith("refused"):
        row.outcome, row.reason = _split(said)
    return said != "ok"


def _same_packed(model: nn.Module) -> str:
    """ "ok", or what happened: packed states against padded ones, the texts longer than any window."""
    lengths = PACKED_LENGTHS
    try:
        expected = _states(model, _padded(lengths, left=None))
    except Exception:
        lengths, expected = LENGTHS[:2], None
    try:
        pack(model)
    except Exception as error:
        return f"{'refused' if _own(error) else 'unclear error'}: {_said(error)}"
    try:
        if expected is None:
            return "silently wrong: it was packed, though it does not run padded"
        got = _states(model, _padded(lengths, left=None))
    except Exception as error:
        return f"unclear error: packed, and then {_said(error)}"
    finally:
        unpack(model)
    error = _apart(got, expected)
    return "ok" if error < 1e-3 else f"silently wrong: packed and padded differ by {error:.1e}"


def _taps(model: nn.Module) -> str:
    """Taps against the library's hidden states, as the model stands."""
    batch = _padded(LENGTHS[:2])
    try:
        taps = Taps(model)
    except Exception as error:
        return f"{'refused' if _own(error) else 'unclear error'}: {_said(error)}"
    with taps, torch.no_grad():
        try:
            model(**_call(model, batch))
            got = taps.take()
        except Exception as error:
            return f"{'refused' if _own(error) else 'unclear error'}: {_said(error)}"
    try:
        with torch.no_grad():
            output = model(**_call(model, batch), output_hidden_states=True)
    except Exception as error:
        return f"no hidden states: {_said(error)}"
    states = output.get("hidden_states")
    if states is None:
        return "no hidden states"
    last = batch["attention_mask"].sum(1) - 1
    rows = [state[torch.arange(2), last] for state in states if state.dim() == 3]
    ways = {"ok": rows[1:], "ok: hidden_states[:-2] and [-1]": rows[:-2] + rows[-1:]}
    taken = list(got.unbind(1))
    if len(taken) > len(rows) - 1:  # the library keeps no state of some layers (Mllama's cross-attention)
        places = [next((i for i, tap in enumerate(taken) if torch.equal(tap, row)), -1) for row in rows[1:]]
        if -1 not in places and places == sorted(set(places)):
            return "ok: hidden_states[1:] and layers that it leaves out"
    if "last_hidden_state" in output:  # DPR returns its pooled state
        final = output.last_hidden_state[torch.arange(2), last]
        ways["ok: hidden_states[1:-1] and last_hidden_state"] = [*rows[1:-1], final]
    for said, expected in ways.items():
        if len(expected) == got.shape[1] and all(map(torch.equal, got.unbind(1), expected)):
            return said
    return f"silently wrong: {got.shape[1]} layers, other rows than the {len(states)} hidden states"


def _reloaded(model: nn.Module, backend: str, before: list[Tensor]) -> str:
    """Saved bidirectional, loaded, `bidirectional`, `causal`: is it the model it was at first?"""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        try:
            loaded = type(model).from_pretrained(folder, attn_implementation=backend).eval()  # type: ignore[attr-defined]
        except Exception as error:
            return f"not loaded: {_said(error)}"
    try:
        bidirectional(loaded)
        causal(loaded)
        answers = probe(loaded, _padded(LENGTHS))
        error = _apart(_states(loaded, _padded(LENGTHS)), before)
    except Exception as error:
        return f"unclear error: {_said(error)}"
    ahead = [index for index, layer in enumerate(answers) if any(layer)]
    if ahead or error > 1e-3:
        return f"silently wrong: layers {ahead} look ahead, states differ by {error:.1e}"
    return "ok"


# --- the probe --------------------------------------------------------------------------------------------------------


def _unsound(model: nn.Module, encoder: bool = False) -> str:
    """ "" or what is wrong with a model that is to read both ways."""
    lengths = LENGTHS[: 2 if encoder else 3]
    for name, batch in (("padded", _padded(lengths)), ("unpadded", _padded(LENGTHS[:1] * 2))):
        answers = probe(model, batch)
        if deaf := [index for index, layer in enumerate(answers) if not all(layer)]:
            return f"layers {deaf} do not look ahead in a {name} batch"
    alone = [_states(model, _padded([n], seed))[0] for seed, n in enumerate(lengths)]
    error = _apart(_states(model, _padded(lengths)), alone)
    return "" if error < 1e-3 else f"padded and lone texts differ by {error:.1e}"


def probe(model: nn.Module, batch: dict[str, Tensor]) -> list[list[bool]]:
    """For each layer and text: whether the layer's last token reaches its first."""
    _, layers = find_layers(model)
    found: list[list[bool]] = []
    ends = [(int(mask.argmax()), int(mask.argmax() + mask.sum()) - 1) for mask in batch["attention_mask"]]

    def hook(layer: Any, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]

        def run(x: Tensor) -> Tensor:
            output = layer.forward(x, *args[1:], **kwargs) if args else layer.forward(**{**kwargs, "hidden_states": x})
            return output[0] if isinstance(output, tuple) else output

        try:
            found.append(_by_gradient(run, hidden, ends))
        except (RuntimeError, NotImplementedError):  # no backward on this backend
            found.append([False] * len(ends))
        if not all(found[-1]):
            found[-1] = [one or other for one, other in zip(found[-1], _by_changes(run, hidden, ends), strict=True)]

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        _states(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _by_gradient(run: Callable, hidden: Tensor, ends: list[tuple[int, int]]) -> list[bool]:
    with torch.enable_grad():
        x = hidden.detach().clone().requires_grad_()
        output = run(x * 1.0)
        answers = []
        for row, (first, last) in enumerate(ends):
            weights = torch.linspace(-1, 2, output.shape[-1])
            (grad,) = torch.autograd.grad((output[row, first] * weights).sum(), x, retain_graph=True)
            answers.append(bool(grad[row, last].abs().max() > 0))
    return answers


def _by_changes(run: Callable, hidden: Tensor, ends: list[tuple[int, int]]) -> list[bool]:
    generator = torch.Generator().manual_seed(7)
    answers = [False] * len(ends)
    with torch.no_grad():
        base, again = run(hidden.clone()), run(hidden.clone())
        for trial in range(24):
            changed = hidden.clone()
            for row, (first, last) in enumerate(ends):
                token = hidden[row, first + trial % (last - first)]
                noise = torch.randn(token.shape, generator=generator)
                changed[row, last] = token + (0.4, 0.1, 1.0)[trial % 3] * token.std() * noise
            output = run(changed)
            for row, (first, _) in enumerate(ends):
                moved, noise = ((t[row, first] - base[row, first]).abs().max() for t in (output, again))
                answers[row] |= bool(moved > 4 * noise + 1e-6 * base[row, first].abs().max())
    return answers


def _padded(lengths: Any, seed: int = 0, left: int | None = 2) -> dict[str, Tensor]:
    """Texts padded right, but one of them left; text i is that of seed + i."""
    lengths = list(lengths)
    ids, mask = (torch.zeros(len(lengths), max(lengths), dtype=torch.long) for _ in range(2))
    for i, n in enumerate(lengths):
        generator = torch.Generator().manual_seed(seed + i)
        place = slice(ids.shape[1] - n, None) if i == left else slice(0, n)
        ids[i, place] = torch.randint(VOCABULARY // 2, VOCABULARY, (n,), generator=generator)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _call(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    takes = inspect.signature(type(model).forward).parameters
    return {**batch, **({"use_cache": False} if "use_cache" in takes else {})}


def _states(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The last hidden state of each text, [n, D]."""
    with torch.no_grad():
        output = model(**_call(model, batch))
        if not hasattr(output, "last_hidden_state"):  # a model that returns its pooled state (DPR)
            trunk, _ = find_layers(model)
            output = trunk(**_call(trunk, batch))
    hidden = output.last_hidden_state
    return [hidden[i][mask.bool()] for i, mask in enumerate(batch["attention_mask"])]


def _apart(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference; infinite where there is a NaN."""
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


# --- errors -----------------------------------------------------------------------------------------------------------


def _own(error: Exception) -> bool:
    """Whether this package raised it, in words of its own."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(ROOT / "mlpool") and (last.line or "").startswith("raise ")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _split(said: str) -> tuple[str, str]:
    outcome, _, reason = said.partition(": ")
    return outcome, reason


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"over {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """The rows of a CSV; none where it is not there. A line that was cut off counts for nothing."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf8") as file:
        lines = [line for line in csv.DictReader(file) if None not in line.values() and None not in line]
    return [Row(**{**line, "seconds": float(line["seconds"] or 0)}) for line in lines]  # type: ignore[arg-type]


def run(path: Path, names: list[str], done: set[tuple[str, str]]) -> None:
    """Examine what is not done, a row at a time."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        for name in names:
            row = None
            for backend in BACKENDS:
                if (name, backend) in done:
                    continue
                if row is not None and row.outcome == "refused" and row.reason.startswith("ValueError"):
                    # refused for what it is, whatever runs its attention
                    row = replace(row, backend=backend, taps="", seconds=0.0)
                else:
                    row = examine(name, backend)
                writer.writerow(asdict(row))
                file.flush()
                tried = f"{row.taps[:24]:24} {row.reload[:16]:16} {row.seconds}"
                print(f"{name:28} {backend:15} {row.outcome:15} {tried}", flush=True)


def summary(rows: list[Row]) -> str:
    """Counts of each backend, and every fault."""
    lines = []
    for backend in BACKENDS:
        counts = Counter(row.outcome for row in rows if row.backend == backend)
        lines.append(f"{backend:15} " + ", ".join(f"{outcome} {n}" for outcome, n in counts.most_common()))
    for name in ("taps", "reload", "causal_packed"):
        counts = Counter(getattr(row, name).split(":")[0] for row in rows if getattr(row, name))
        lines.append(f"{name:15} " + ", ".join(f"{said} {n}" for said, n in counts.most_common()))
    faults = [(row, fault) for row in rows for fault in row.faults]
    counts = Counter(fault.split(":")[0] for _, fault in faults)
    lines += [f"{row.family} on {row.backend}: {fault} {row.reason}"[:300] for row, fault in faults]
    return "\n".join([*lines, ", ".join(f"{name}: {counts[name]}" for name in FAULTS)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--only", type=lambda text: text.split(","), help="families, tried again")
    parser.add_argument("--tables", action="store_true", help="write the tables of docs/, run nothing")
    arguments = parser.parse_args()
    if arguments.tables:
        from tables import write_tables

        write_tables(read(arguments.csv))
        return 0
    os.nice(10)  # a long run beside other work
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = read(arguments.csv)
    if arguments.only:
        kept = [row for row in rows if row.family not in arguments.only]
        _rewrite(arguments.csv, kept)
    done = {(row.family, row.backend) for row in read(arguments.csv) if row.transformers == transformers.__version__}
    run(arguments.csv, arguments.only or families(), done)
    rows = read(arguments.csv)
    print(f"transformers {importlib.metadata.version('transformers')}\n{summary(rows)}")
    return int(any(row.faults for row in rows))


def _rewrite(path: Path, rows: list[Row]) -> None:
    if path.exists():
        with path.open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    sys.exit(main())
