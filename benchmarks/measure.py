"""What every benchmark shares: time, peak memory, the device's own limits, errors, and tables, CSV files and plots."""

from __future__ import annotations

import csv
import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
# Written before every timed call, so that the call finds none of its inputs in the L2 cache.
FLUSH_BYTES = 256 << 20
_START = time.perf_counter()

Run = Callable[[], Any]
Row = dict[str, Any]


def progress(message: str) -> None:
    print(f"[{time.perf_counter() - _START:5.0f} s] {message}", file=sys.stderr, flush=True)


# --- time -------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds of one call: GPU events after an L2 flush, or, for latencies and on a CPU, wall time to the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.events = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.events else None

    def __call__(self, run: Run, latency: bool = False) -> float:
        if self.flush is None:
            return wall_time(run, self.device)
        self.flush.zero_()
        if latency:
            return wall_time(run, self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def wall_time(run: Run, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def rounds(
    runs: Mapping[str, tuple[Run, Run]], clock: Clock, budget: float, most: int, latency: bool
) -> dict[str, list[float]]:
    """Seconds of every call: each round calls every provider once, so that drift of the machine hits them all.

    Args:
        runs: name -> (prepare, call); prepare is not timed. budget: seconds per provider, at least one call each.
        most: calls per provider.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(most):
        # A provider stops where one more call would pass its budget; a slow one gets three calls if twice that allows.
        due = [name for name, s in samples.items() if not s or sum(s) + s[-1] <= budget * (1 if len(s) > 2 else 2)]
        if not due:
            break
        for name in due:
            prepare, call = runs[name]
            prepare()
            samples[name].append(clock(call, latency))
    return samples


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 %."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return cuts[1], statistics.median(samples), cuts[7]


# --- memory -----------------------------------------------------------------------------------------------------------


def extra_memory(run: Run, device: torch.device) -> tuple[int | None, float]:
    """Peak bytes above what was there before `run`, and its wall time.

    On a GPU the allocator's peak; on Linux the peak resident set, which the kernel resets on request and in which
    pages of freed memory are given back first. Elsewhere None: no system reports a peak that can be reset.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        seconds = wall_time(run, device)
        return torch.cuda.max_memory_allocated(device) - before, seconds
    before_cpu = _resident_after_trim()
    seconds = wall_time(run, device)
    if before_cpu is None:
        return None, seconds
    return max(0, _status("VmHWM") - before_cpu), seconds


def _resident_after_trim() -> int | None:
    """Resident bytes with the peak reset to them; None where the system cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def touch(size: int, device: torch.device) -> None:
    """On a CPU have the system hand out `size` bytes once: a virtual machine is slow to give what it never gave."""
    if device.type == "cpu":
        torch.empty(size, dtype=torch.int8).fill_(1)


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allocated."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return 8 << 30


# --- the device -------------------------------------------------------------------------------------------------------


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few large matrix products: what every floor is measured against."""
    large = device.type == "cuda"
    shapes = [(8192, 8192, 8192), (16384, 4096, 16384)] if large else [(768, 896, 7168), (1536, 4096, 4096)]
    best = 0.0
    for m, k, n in shapes:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        best = max(best, 2 * m * k * n / _best_time(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out), device))
    return best


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a large tensor."""
    source = torch.zeros((2 << 30) if device.type == "cuda" else (128 << 20), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_time(lambda: target.copy_(source), device)


def _best_time(run: Run, device: torch.device) -> float:
    """Seconds per call; on a GPU many calls in a row, as clocks fall under a lasting load."""
    calls = 20 if device.type == "cuda" else 1

    def several() -> None:
        for _ in range(calls):
            run()

    several()
    return min(wall_time(several, device) for _ in range(5)) / calls


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {cores()} cores"


def device_slug(device: torch.device) -> str:
    """For file names: cpu-2cores, nvidia-h200."""
    name = f"cpu-{cores()}cores" if device.type == "cpu" else device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load() -> float | None:
    """How many cores others keep busy, as far as the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def facts(device: torch.device) -> Row:
    """What a row must carry to be read later: device, versions, commit."""
    return {
        "device": device_name(device), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "triton": _version("triton"), "mlpool": _version("mlpool"), "commit": commit(),
        "load": load(),
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    """The checked-out commit, with + where code of the package differs from it."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "kernels", "mlpool")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- a run ------------------------------------------------------------------------------------------------------------


class Skipped(Exception):
    """A case that this machine cannot hold; its message says why."""


def run_cases(cases: Iterable[tuple[Row, Callable[[], Sequence[Row]]]], device: torch.device) -> tuple[list[Row], int]:
    """Measure case after case: (the columns that name it, what measures it). Returns the rows and the exit status.

    A case that raises becomes a row that says so, and the rest goes on, but for a GPU that is lost to the process.
    Status 1: a row is wrong, or there is none.
    """
    rows: list[Row] = []
    for key, measure in cases:
        name = " ".join(map(str, key.values()))
        try:
            rows += [{**row, **key} for row in measure()]
        except Skipped as reason:
            progress(f"skipped: {name}: {reason}")
        except Exception as error:
            traceback.print_exc()
            rows.append({**key, "green": False, "failed": f"{type(error).__name__}: {error}"[:200]})
            if is_lost(device):
                progress(f"{name}: the GPU answers this process no more, so the cases after it are left; run again")
                break
        gc.collect()
    for row in rows:
        if row["green"] is False:
            name = " ".join(str(row[part]) for part in ("case", "provider") if part in row)
            print(f"WRONG: {name}: {row.get('failed', 'out of bounds')}", flush=True)
    return rows, int(not rows or not all(row["green"] for row in rows))


def is_lost(device: torch.device) -> bool:
    """Whether an error of a kernel has ended the process's use of the GPU, as an illegal access does."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


# --- errors -----------------------------------------------------------------------------------------------------------


def relative_error(value: Tensor, truth: Tensor, least: float = 1e-30) -> float:
    """‖value − truth‖ / ‖truth‖; NaN where value holds one. least: the smallest norm to divide by."""
    return float((value.to(truth.dtype) - truth).norm() / truth.norm().clamp(min=least))


# --- output -----------------------------------------------------------------------------------------------------------


def number(x: float | None) -> str:
    """Three significant digits, never an exponent for what a benchmark shows."""
    if x is None:
        return "-"
    return f"{x:,.{0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2 if abs(x) >= 1 else 3}f}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first and the last to the left."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    align = [str.ljust, *[str.rjust] * (len(header) - 2), str.ljust]
    lines = ["  ".join(a(c, w) for a, c, w in zip(align, line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def write(rows: Sequence[Row], folder: Path, name: str, title: str) -> None:
    """CSV and plot."""
    write_csv(rows, folder / f"{name}.csv")
    timed = [row for row in rows if "median_ms" in row]
    drawn = plot(timed, folder / f"{name}.png", title) if timed else False
    print(f"\nwritten: {name}.csv{f' and {name}.png' if drawn else ''} in {folder.name}/")


def plot(rows: Sequence[Row], path: Path, title: str) -> bool:
    """Bars of speed-up over eager and of extra memory, one group per case; False where matplotlib is missing.

    Rows need: case, provider, ratio_eager, extra_mib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        progress("no plot: pip install matplotlib")
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases, providers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "provider"))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 1.5 + 0.18 * len(rows)), sharey=True, layout="constrained")
    colors = dict(zip(providers, pyplot.get_cmap("tab10").colors * 2, strict=False)) | {"eager": "0.65"}
    places, ticks, place = [], [], 0.0
    for case in cases:
        group = [row for row in rows if row["case"] == case]
        places += [(place + i, row) for i, row in enumerate(group)]
        ticks.append(place + (len(group) - 1) / 2)
        place += len(group) + 1
    for axis, key in zip(axes, ("ratio_eager", "extra_mib"), strict=True):
        for y, row in places:
            if row.get(key) is not None:
                axis.barh(y, row[key], color=colors[row["provider"]])
                axis.text(row[key], y, f" {number(row[key])}", va="center", fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    axes[0].set_yticks(ticks, cases)
    axes[0].invert_yaxis()
    axes[0].axvline(1, color="0.6", linewidth=0.8)
    axes[0].set_xlabel("speed-up over the eager reference")
    axes[1].set_xscale("log")
    axes[1].set_xlabel("peak extra memory, MiB")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[p]) for p in providers]
    figure.legend(handles, providers, title=title, loc="outside upper center", ncols=len(providers), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
