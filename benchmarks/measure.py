"""What every benchmark shares: its start, time, peak memory, the device's own limits, errors, and tables."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import hashlib
import importlib.metadata
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# What `mlpool doctor` asks too.
from mlpool.doctor import no_card as no_card
from mlpool.doctor import no_compiler as no_compiler
from mlpool.doctor import relative_error as relative_error

RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).parent.parent
# Written before every timed call, so that the call finds none of its inputs in the L2 cache.
FLUSH_BYTES = 256 << 20
START = time.perf_counter()
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines for every measurement of memory

Run = Callable[[], Any]
Row = dict[str, Any]


def progress(message: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {message}", file=sys.stderr, flush=True)


# --- the start --------------------------------------------------------------------------------------------------------


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark takes; see `start`, `Rows` and `run_cases`."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; 1 where others use the cores too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the rows; a run there is taken up")
    parser.add_argument("--minutes", type=float, help="start no case after so many; run again to go on")
    parser.add_argument("--again", action="store_true", help="measure again what failed or was wrong")


def start(args: argparse.Namespace, tuned: bool = True) -> torch.device:
    """The device of a run, once all is there that it needs.

    Args:
        args: of `add_run_arguments`.
        tuned: use the tiles that the results hold for this device, unless MLPOOL_TILES names others.

    Raises SystemExit, in one line: no GPU, no C compiler or Python headers for Triton, results that cannot be written.
    """
    device = torch.device(args.device)
    if device.type == "cuda" and (missing := no_card() or no_compiler()):
        raise SystemExit(missing)
    writable(args.results)
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type == "cuda":
        if tuned and tiles_file(args.results, device).is_file():
            os.environ.setdefault("MLPOOL_TILES", str(tiles_file(args.results, device).resolve()))
        progress(f"tiles: {os.environ.get('MLPOOL_TILES', 'the defaults')}")
    if (path := os.environ.get("MLPOOL_TILES")) and not Path(path).is_file():
        raise SystemExit(f"MLPOOL_TILES={path} is no file: unset it for the default tiles, or run benchmarks/tune.py")
    return device


def tiles_file(results: Path, device: torch.device) -> Path:
    """Where tune.py writes its choice for a device, and where the other benchmarks look for it."""
    return results / f"tiles-{device_slug(device)}.json"


def writable(folder: Path) -> None:
    """SystemExit where no file can be written in `folder`; makes it."""
    probe = folder / f".{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise SystemExit(f"results cannot be written to {folder} ({error.strerror}): give another folder") from None


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


def peak_memory(run: Run, device: torch.device) -> tuple[int, float]:
    """Peak bytes of tensors above those there before, and the wall time.

    On a CPU every allocation is recorded: in the resident set a long run of small steps is several times what it holds
    at once, as the C library keeps what was freed between them.
    """
    if device.type == "cuda":
        peak, seconds = extra_memory(run, device)
        return peak or 0, seconds
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        seconds = wall_time(run, device)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0)), seconds


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


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, blocks of up to 1 GiB too, for the next allocation; elsewhere nothing happens."""
    try:
        adjust = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((-1, -1), (-3, 1 << 30)):  # M_TRIM_THRESHOLD: never; M_MMAP_THRESHOLD
        adjust(option, value)


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
    """What a row must carry to be read later: device, versions, commit, digests of the sources and tiles, the day."""
    return {
        "device": device_name(device), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "triton": _version("triton"), "mlpool": _version("mlpool"), "commit": commit(),
        "code": code(), "tiles": tiles(), "load": load(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    """The checked-out commit, with + where code of the package differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "kernels", "mlpool")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code() -> str:
    """A digest of all that is measured and measures: a commit says nothing of changes, and a copy may have none."""
    digest = hashlib.sha256()
    for folder in ("kernels", "mlpool", "benchmarks"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def tiles() -> str:
    """A digest of the file of tiles that is used, or "default"."""
    path = os.environ.get("MLPOOL_TILES")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:10] if path else "default"


# --- a run ------------------------------------------------------------------------------------------------------------


class Skipped(Exception):
    """A case that this machine cannot hold; its message says why."""


def is_lost(device: torch.device) -> bool:
    """Whether an error of a kernel has ended the process's use of the GPU, as an illegal access does."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


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
