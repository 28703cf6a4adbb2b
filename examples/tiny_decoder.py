"""Train a tiny decoder from scratch, with its tokenizer: a base model for `mlpool.load` that needs no download.

    python examples/tiny_decoder.py --data ../shared/data/text -o tiny-decoder

Qwen2 architecture, 7 million parameters, byte-level BPE vocabulary of 8,000. The data are train.jsonl and valid.jsonl,
one {"text": "..."} a line; any prose will do. The learning rate falls with the clock and time for validation is kept
back, so that all ends within --minutes, unless the machine gets busier after the start; with --steps instead, a seed
gives the same model again. The folder loads with `AutoModel` and `AutoTokenizer`; its training.json says how it came
about.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

WARMUP = 0.03  # share of the run in which the learning rate rises
EXPECTED = 'expected a folder with train.jsonl and valid.jsonl, one {"text": "some prose"} a line; any prose will do'


def read(path: Path) -> list[str]:
    """The texts of a JSONL file; a file or a line that is not as expected ends the run by name."""
    if not path.is_file():
        raise SystemExit(f"no {path}: {EXPECTED}")
    texts = []
    for number, line in enumerate(path.open(encoding="utf-8"), 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise SystemExit(f"{path}, line {number} is {line.strip()[:60]!r}: {EXPECTED}")
        texts.append(text)
    return texts


def train_tokenizer(texts: list[str], vocabulary: int, length: int) -> PreTrainedTokenizerBase:
    """Qwen2's tokenizer with a vocabulary of these texts: <|endoftext|> ends and pads, and is not appended."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(iter(texts), vocabulary, show_progress=False)
    tokenizer.model_max_length = length
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Tensor]:
    """Token ids of each text, <|endoftext|> at its end: [T] int64 each, of any length."""
    rows = tokenizer(texts, verbose=False)["input_ids"]
    return [torch.tensor([*row, tokenizer.eos_token_id]) for row in rows]


def pack(documents: list[Tensor], length: int) -> Tensor:
    """Documents one after the other, cut into rows [N, length]: no padding; what does not fill a row is left out."""
    stream = torch.cat(documents)
    if len(stream) < length:
        raise SystemExit(f"{len(stream)} tokens of text do not fill one row of --length {length}: give more text")
    return stream[: len(stream) // length * length].view(-1, length)


def batches(documents: list[Tensor], length: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """[batch, length] without end: every epoch packs the documents in a new order, so it cuts them at new places."""
    while True:
        order = torch.randperm(len(documents), generator=generator)
        rows = pack([documents[i] for i in order], length)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        yield from rows.split(batch)


def bfloat16_is_faster(width: int) -> bool:
    """Measured by a product of this width: CPUs without bfloat16 instructions emulate them, slowly."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, width, dtype=dtype), torch.ones(width, 4 * width, dtype=dtype)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)


@torch.inference_mode()
def perplexity(model: Qwen2ForCausalLM, rows: Tensor, batch: int) -> float:
    """Perplexity over packed rows [N, T] in float32, every token but the first of a row predicted."""
    model.eval()
    parts = tqdm(rows.split(batch), desc="validation", leave=False)
    losses = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in parts)
    model.train()
    return math.exp(losses / len(rows))


def rate_at(progress: float) -> float:
    """Factor of the learning rate: linear rise, then a cosine to a hundredth at progress 1."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.01)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=args.hidden, num_hidden_layers=args.layers,
        intermediate_size=3 * args.hidden, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=args.length, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def train(model: Qwen2ForCausalLM, data: Iterator[Tensor], args: argparse.Namespace, deadline: float) -> dict:
    """Train until `deadline` (time.monotonic, s), or for args.steps; -> steps, tokens, seconds and mean last losses."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # norms and biases: nothing to decay
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    low = args.precision == "bfloat16"
    start, tokens, progress = time.monotonic(), 0, 0.0
    losses: list[float] = []
    with tqdm(total=1.0, bar_format="training {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}") as bar:
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * rate_at(progress)
            rows = next(data)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = model(input_ids=rows, labels=rows).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"the loss is {losses[-1]} at step {len(losses)}: lower --rate (now {args.rate:g})")
            recent = sum(losses[-50:]) / len(losses[-50:])
            tokens += rows.numel()
            seconds = time.monotonic() - start
            progress = min(len(losses) / args.steps if args.steps else seconds / (deadline - start), 1.0)
            bar.set_postfix_str(
                f"loss {recent:.3f}, ppl {math.exp(recent):.1f}, {tokens / seconds:.0f} tokens/s", False
            )
            bar.update(progress - bar.n)
    return {"steps": len(losses), "tokens": tokens, "seconds": seconds, "train_loss": recent}


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and valid.jsonl")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=13, help="time for everything (default 13)")
    parser.add_argument("--steps", type=int, help="train for so many steps instead of until the time is over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 8")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=4, help="rows in a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="of the products; default: the faster one")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and value <= 0 and name != "seed":
            parser.error(f"--{name} must be above 0, not {value}")
    if args.hidden % 8:
        parser.error(f"--hidden must be a multiple of 8 (four heads of even size), not {args.hidden}")

    texts = {split: read(args.data / f"{split}.jsonl") for split in ("train", "valid")}
    if args.out.exists() and not args.out.is_dir():
        raise SystemExit(f"{args.out} is a file: give -o a folder")
    args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written shows before the training
    args.precision = args.precision or ("bfloat16" if bfloat16_is_faster(args.hidden) else "float32")
    tokenizer = train_tokenizer(texts["train"], args.vocabulary, args.length)
    documents = tokenize(tokenizer, texts["train"])
    valid = pack(tokenize(tokenizer, texts["valid"]), args.length)

    torch.manual_seed(args.seed)
    model = new_model(args, tokenizer)
    before = time.monotonic()
    untrained = perplexity(model, valid, args.batch)
    # Validation after the training takes as long again; half as much more, and 2 s to save, are the reserve.
    deadline = start + 60 * args.minutes - 1.5 * (time.monotonic() - before) - 2
    if deadline < time.monotonic() and not args.steps:
        raise SystemExit(f"--minutes {args.minutes:g} is over before the training starts: give more")
    data = batches(documents, args.length, args.batch, torch.Generator().manual_seed(args.seed))
    result = train(model, data, args, deadline)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    result["epochs"] = result["tokens"] / sum(map(len, documents))
    result["perplexity_untrained"], result["perplexity"] = untrained, perplexity(model, valid, args.batch)
    result["parameters"] = model.num_parameters()
    result["seconds_in_all"] = time.monotonic() - start
    options = {name: value for name, value in vars(args).items() if name not in ("data", "out")}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    versions["python"] = platform.python_version()
    about = {**result, "options": options, "threads": torch.get_num_threads(), "versions": versions}
    (args.out / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(
        f"{args.out}: {result['parameters'] / 1e6:.1f} million parameters, {result['steps']} steps, "
        f"{result['tokens'] / 1e6:.2f} million tokens ({result['epochs']:.1f} epochs), "
        f"validation perplexity {result['perplexity']:.1f} (untrained {untrained:.0f}), "
        f"{result['seconds_in_all'] / 60:.1f} minutes"
    )


if __name__ == "__main__":
    main()
