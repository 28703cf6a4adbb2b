"""Packed against padded execution of a decoder, causal and bidirectional, on the lengths of real texts.

    python benchmarks/attention.py                       under two minutes on two CPU cores; larger on a GPU
    python benchmarks/attention.py --full                all layers, several batches; the default on a GPU
    python benchmarks/attention.py --data folder         JSON lines with query and positive, anywhere below it
    python benchmarks/attention.py --batch-size 128 --max-tokens 1024

The model has the shapes of Qwen2-0.5B and random weights; its vocabulary is cut, since embeddings are looked up. A text
has as many tokens as words and punctuation marks; without data the lengths are log-normal. Prints tables and adds their
rows to a CSV in benchmarks/results/ as they are measured. A row whose error is out of bounds shows no speed, and the
exit status is 1. What the columns mean:

    tokens/s    of the texts, padding not counted
    extra MiB   peak of tensors above weights, their gradients and inputs
    vs sdpa     speed-up over padded sdpa; the target is 0.9 times padded tokens over the texts' own
    memory      extra MiB over that of padded sdpa
    x floor     time over that of the texts' matrix products alone (attention left out), at the rate of a large product
    error       relative, of the last hidden states and, behind |, of the gradient by the embeddings, on a few texts
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from measure import (
    Clock,
    Row,
    add_run_arguments,
    device_name,
    device_slug,
    facts,
    number,
    peak_memory,
    product_rate,
    progress,
    quantiles,
    relative_error,
    rounds,
    start,
    table,
)
from rows import Rows, run_cases
from torch import Tensor, nn

from mlpool.attention import bidirectional, causal
from mlpool.attention.packed import pack, unpack
from mlpool.taps import Taps

HEADER = ["", "median ms", "20-80 %", "tokens/s", "extra MiB", "vs sdpa", "memory", "x floor", "error", "target"]
DATA = Path(__file__).parent.parent / "../shared/data"
SIZES = {
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
    "vocab_size": 2048, "max_position_embeddings": 32768, "pad_token_id": 0,
}  # fmt: skip
LAYERS = 24
MODES = ("forward", "forward+backward")
# Largest relative errors in float32; in low precision, how often the error of padded eager.
FORWARD, BACKWARD, LOW = 1e-5, 1e-4, 2.0
CHECKED = 32  # texts that the errors are computed on
BUDGET = (3.0, 15.0)  # seconds a provider: quick, full
# Of padded tokens over the texts' own: the least speed-up of packed over padded sdpa.
TARGET = 0.9


def read_lengths(folder: Path, max_tokens: int) -> tuple[list[int], str]:
    """Tokens of each text, in random order, and where they are from."""
    draw = random.Random(0)
    lengths = []
    for path in sorted(folder.rglob("*.jsonl")) if folder.is_dir() else []:
        with path.open() as file:
            records = [json.loads(line) for line in file if line.strip()]
        texts = [r[key] for r in records for key in ("query", "positive") if isinstance(r.get(key), str)]
        lengths += [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]
    source = "real texts"
    if not lengths:
        lengths, source = [round(draw.lognormvariate(3.2, 0.9)) for _ in range(10_000)], "log-normal lengths"
    draw.shuffle(lengths)
    return [min(max(n, 1), max_tokens) for n in lengths], source


class Bench:
    """One model, some padded batches, and every way to run them."""

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import Qwen2Config, Qwen2Model

        self.device, self.dtype = device, dtype
        lengths, self.source = read_lengths(args.data / "pairs" if (args.data / "pairs").is_dir() else args.data,
                                            args.max_tokens)  # fmt: skip
        torch.manual_seed(0)
        with device:
            self.model = Qwen2Model(Qwen2Config(num_hidden_layers=args.layers, **SIZES)).to(dtype).eval()
        self.layers = args.layers
        size = args.batch_size
        self.batches = [self._batch(lengths[i * size : (i + 1) * size]) for i in range(args.batches)]
        self.tokens = sum(int(batch["attention_mask"].sum()) for batch in self.batches)
        self.padded = sum(batch["attention_mask"].numel() for batch in self.batches)
        products = [m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Linear)]
        self.flops = 2 * sum(products) * self.tokens  # of one forward
        self.implementation = "sdpa"

    def _batch(self, lengths: list[int]) -> dict[str, Tensor]:
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        ids = torch.randint(1, SIZES["vocab_size"], mask.shape) * mask
        return {"input_ids": ids.to(self.device), "attention_mask": mask.long().to(self.device)}

    def use(self, provider: str, direction: str) -> None:
        """Make the model run that way; not timed."""
        unpack(self.model)
        self.model.set_attn_implementation("sdpa" if provider == "packed" else provider)
        if direction == "bidirectional":
            bidirectional(self.model, check=False)
        else:
            causal(self.model)
        if provider == "packed":
            pack(self.model, check=False)

    def clear(self) -> None:
        for parameter in self.model.parameters():  # kept allocated, as an optimizer leaves them
            parameter.grad = None if parameter.grad is None else parameter.grad.zero_()

    def run(self, mode: str) -> None:
        for batch in self.batches:
            with torch.set_grad_enabled(mode != "forward"), Taps(self.model, "mean", layers=[-1]) as taps:
                self.model(**batch, use_cache=False)
                if mode != "forward":
                    taps.take().square().mean().backward()

    def results(self, mode: str) -> list[Tensor]:
        """Last hidden states of the first texts and, with backward, the gradient by their embeddings."""
        batch = {name: tensor[:CHECKED] for name, tensor in self.batches[0].items()}
        real = batch["attention_mask"].bool()
        embeds = self.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(mode != "forward")
        with torch.set_grad_enabled(mode != "forward"):
            call = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
            hidden = self.model(**call, use_cache=False).last_hidden_state[real]
        found = [hidden.detach()]
        if mode != "forward":
            weights = torch.linspace(-1, 1, hidden.numel(), device=self.device).view_as(hidden)
            (gradient,) = torch.autograd.grad(hidden, embeds, weights.to(hidden.dtype))
            found.append(gradient[real])
        return found

    def truth(self, mode: str, direction: str) -> list[Tensor]:
        """Padded eager, in float32."""
        self.use("eager", direction)
        self.model.float()
        found = self.results(mode)
        self.model.to(self.dtype)
        return found


def measure(bench: Bench, key: Row, providers: list[str], budget: float) -> list[Row]:
    """The rows of one case; `key` has its direction and mode."""
    direction, mode, case, device = key["direction"], key["mode"], key["case"], bench.device
    progress(f"{case}: parity")
    truth = bench.truth(mode, direction)
    errors: dict[str, list[float]] = {}
    for name in ("eager", *(name for name in providers if name != "eager")):
        bench.use(name, direction)
        known = name == "eager" and bench.dtype == torch.float32
        found = truth if known else bench.results(mode)
        errors[name] = [relative_error(got, want) for got, want in zip(found, truth, strict=True)]
    bounds = [FORWARD, BACKWARD] if bench.dtype == torch.float32 else [LOW * error for error in errors["eager"]]
    red = [name for name in providers if not all(e <= b for e, b in zip(errors[name], bounds, strict=False))]
    extra, why = _memory(bench, case, mode, direction, [name for name in providers if name not in red])
    progress(f"{case}: time")

    def prepare(name: str) -> None:
        bench.use(name, direction)
        bench.clear()

    runs = {name: (lambda name=name: prepare(name), lambda: bench.run(mode)) for name in extra}
    if device.type == "cuda":
        for ready, run in runs.values():
            ready()
            run()
    rate = product_rate(device, bench.dtype)
    samples = rounds(runs, Clock(device), budget, 20, latency=False)
    floor = bench.flops * (1 if mode == "forward" else 3) / rate
    rows = []
    for name in providers:
        row: Row = key | {
            "preset": "qwen2-0.5b", "provider": name, "execution": "packed" if name == "packed" else "padded",
            "lengths": bench.source, "tokens": bench.tokens, "padded_tokens": bench.padded,
            "padding_ratio": bench.padded / bench.tokens, "error": errors[name][0], "limit": bounds[0],
            "gradient_error": errors[name][1] if len(errors[name]) > 1 else None,
            "gradient_limit": bounds[1] if len(errors[name]) > 1 else None, "green": name not in red,
            "note": why.get(name, ""),
        }  # fmt: skip
        if name in samples:
            low, median, high = quantiles(samples[name])
            row |= {
                "runs": len(samples[name]), "p20_ms": low * 1e3, "median_ms": median * 1e3, "p80_ms": high * 1e3,
                "tokens_per_s": bench.tokens / median, "floor_ms": floor * 1e3, "ratio_floor": median / floor,
                "flops_per_s": floor * rate / median,
            }  # fmt: skip
            row |= compared(name, median, samples, extra, bench.padded / bench.tokens)
        rows.append(row)
    print(f"\n{case}\n{table(HEADER, map(cells, rows))}", flush=True)
    return rows


def _memory(
    bench: Bench, case: str, mode: str, direction: str, providers: Sequence[str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Peak memory of each provider that fits, and why another does not."""
    extra, why = {}, {}
    for name in providers:
        progress(f"{case}: memory of {name}")
        bench.use(name, direction)
        bench.clear()
        try:
            if mode != "forward" and any(p.grad is None for p in bench.model.parameters()):
                bench.run(mode)  # gradients are not counted
            extra[name], _ = peak_memory(lambda: bench.run(mode), bench.device)
        except torch.OutOfMemoryError:
            why[name] = "out of memory"
    return extra, why


def compared(name: str, median: float, samples: dict, extra: dict, padding: float) -> Row:
    row: Row = {
        f"ratio_{other}": quantiles(samples[other])[1] / median for other in ("eager", "sdpa") if other in samples
    }
    own, sdpa = extra[name], extra.get("sdpa")
    row["extra_mib"] = own / 2**20
    if sdpa:
        row["memory_share"] = own / sdpa
    if name == "packed" and "ratio_sdpa" in row:
        met = row["ratio_sdpa"] >= TARGET * padding
        row |= {"target": f">= {number(TARGET * padding)}x sdpa {'met' if met else 'MISSED'}", "target_met": met}
        if "memory_share" in row:
            fits = row["memory_share"] <= 1 / (TARGET * padding)
            row["target"] += f", <= {number(1 / (TARGET * padding))}x memory {'met' if fits else 'MISSED'}"
            row["target_met"] = met and fits
    return row


def cells(row: Row) -> list[str]:
    error = f"{row['error']:.0e}" + ("" if row["gradient_error"] is None else f" | {row['gradient_error']:.0e}")
    if "median_ms" not in row:
        return [row["provider"], *["-"] * 7, error, row["note"] if row["green"] else "WRONG"]

    def times(key: str) -> str:
        return f"{number(row[key])}x" if row.get(key) is not None else "-"

    spread = f"{number(row['p20_ms'])}-{number(row['p80_ms'])}" if row["runs"] > 1 else "1 run"
    return [
        row["provider"], number(row["median_ms"]), spread, number(row["tokens_per_s"]),
        number(row["extra_mib"]), times("ratio_sdpa"), times("memory_share"), times("ratio_floor"), error,
        row.get("target", ""),
    ]  # fmt: skip


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all layers and several batches also on a CPU")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of JSON lines with query and positive")
    parser.add_argument("--direction", action="append", choices=("causal", "bidirectional"), help="only this one")
    parser.add_argument("--mode", action="append", choices=MODES, help="only this one")
    parser.add_argument("--layers", type=int, help=f"default: 2, full: {LAYERS}")
    parser.add_argument("--batch-size", type=int, help="texts in a batch; default: 32, on a GPU 128")
    parser.add_argument("--batches", type=int, help="default: 1, full: 4")
    parser.add_argument("--max-tokens", type=int, default=512, help="longer texts are cut")
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    args.full |= args.device.startswith("cuda")
    args.layers = args.layers or (LAYERS if args.full else 2)
    args.batches = args.batches or (4 if args.full else 1)
    args.batch_size = args.batch_size or (128 if args.device.startswith("cuda") else 32)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("this benchmark needs transformers: pip install 'mlpool[st]'")
    device = start(args)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    name = f"attention-{device_slug(device)}-{'full' if args.full else 'quick'}.csv"
    rows = Rows(args.results / name, facts(device) | {"transformers": version("transformers")}, args.again)
    bench = Bench(args, device, dtype)
    providers = ["eager", "sdpa", "packed"]
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None and dtype != torch.float32:
        providers.insert(2, "flash_attention_2")
    print(
        f"{device_name(device)}, {torch.get_num_threads()} threads, {str(dtype)[6:]}, torch {torch.__version__}: "
        f"Qwen2-0.5B shapes, {args.layers} layers, {args.batches} x {args.batch_size} texts ({bench.source}), "
        f"{bench.tokens:,} tokens, {bench.padded:,} with padding: {number(bench.padded / bench.tokens)}x",
        flush=True,
    )
    busy = rows.facts["load"] or 0.0
    if device.type == "cpu" and float(busy) > 0.6:
        progress(f"load {busy} before the start, others use the cores: --threads 1 suffers least")
    sizes = {
        "dtype": str(dtype)[6:], "layers": args.layers, "batch": args.batch_size, "batches": args.batches,
        "max_tokens": args.max_tokens,
    }  # fmt: skip
    todo = []
    for direction in args.direction or ("causal", "bidirectional"):
        for mode in args.mode or (MODES if args.full or direction == "bidirectional" else MODES[:1]):
            key = {"case": f"{direction} {mode}", "mode": mode, "direction": direction, **sizes}
            # a quick run takes eager's gradients as the reference and does not time them
            some = providers[1:] if not args.full and mode != "forward" else providers
            todo.append((key, partial(measure, bench, key, some, BUDGET[args.full])))
    return run_cases(todo, rows, device, args.minutes)


if __name__ == "__main__":
    sys.exit(main())
