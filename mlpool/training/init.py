"""`mlpool init`: a commented config for a base and data that it has looked at, which `mlpool train` runs as it is.

Of the base its config and tokenizer are read, no weights. Of the data every row is checked, as `mlpool train` does, and
the lengths of a sample are counted. Each value comes with its reason: a rule of thumb, to start from.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from ..corpus.rows import beside, kind_of
from ..files import write_text
from ..options import check_place
from ..show import plain

SAMPLED = 2000  # pairs whose tokens are counted
MOST_TOKENS, LEAST_TOKENS = 16_384, 1024  # of a mini-batch; above, a GPU gains nothing more
LARGEST_WHOLE = 1_000_000_000  # parameters that are trained whole where memory allows
LITTLE_MORE = 1.25
SMALL = 400_000_000  # parameters of a raw decoder whose LoRA takes the rate that was measured on smaller ones
ENOUGH_STEPS = 200  # to teach a decoder to read in both directions


class Base(NamedTuple):
    """What a base's config says. tuned: a sentence-transformers model. limit: tokens it takes, None for no limit."""

    parameters: int
    layers: int
    hidden: int
    wide: int
    encoder: bool
    tuned: bool
    limit: int | None
    tokenizer: Any

    @property
    def raw_decoder(self) -> bool:
        return not self.encoder and not self.tuned


class Data(NamedTuple):
    """What the data hold. lengths: column -> 95th percentile and longest, in tokens with the prompt, BOS and EOS."""

    pairs: int
    summary: list[str]
    negatives: int
    lengths: dict[str, tuple[int, int]]
    prompts: dict[str, str]
    prompts_reason: str


class Machine(NamedTuple):
    """device: a torch device type. free: bytes. half: whether it computes in bfloat16 at full speed."""

    device: str
    free: int
    half: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="folder or Hub name of a base or sentence-transformers model")
    parser.add_argument("data", metavar="DATA", help="training pairs: a file, folder or Hub name, as of mlpool train")
    parser.add_argument("-o", "--output", required=True, metavar="YAML", help="the config to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a config that is there")


def run(args: argparse.Namespace) -> None:
    output = Path(args.output)
    check_place(args.base)
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} is there already; pass --overwrite to replace it, or another -o")
    if output.suffix not in (".yaml", ".yml"):
        raise ValueError(f"-o {output}: a config's name ends in .yaml")
    _check_data(args.data)
    text = write_config(args.base, args.data, f"runs/{output.stem}")
    write_text(output, text)
    print(f"{output}: try  mlpool train {output} --dry-run")


def _check_data(name: str) -> None:
    """A mistyped file name shows before seconds of imports."""
    path = Path(name).expanduser()
    if not path.exists() and (kind_of(path) or path.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(f"there is no file {name}{beside(path)}")


def write_config(base: str, data: str, output_dir: str) -> str:
    """The text of the config, checked as `mlpool train` will check it.

    Raises:
        FileNotFoundError: no such model or data. ValueError: a folder without a model, an embedder that mlpool saved,
            data without known columns (named) or with bad rows, as `load_pairs` says it.
    """
    import yaml

    from .config import read_config

    looked = look_at_base(base)
    text = compose(base, data, output_dir, looked, look_at_data(data, looked), look_at_machine())
    read_config(yaml.safe_load(text))
    return text


# --- looking ----------------------------------------------------------------------------------------------------------


def look_at_base(name: str) -> Base:
    """The base's sizes, from its config alone: the model is made without memory."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from ..attention.check import is_encoder
    from ..embedder.loading import check_model, is_ours
    from ..taps import find_layers

    modules = check_model(name)
    if modules and is_ours(modules):
        raise ValueError(
            f"{name} is an embedder of mlpool already, whose design is decided; to train it further take "
            "configs/quick.yaml with this folder as model and without design"
        )
    _check_weights(name)
    place: dict[str, Any] = {"subfolder": modules[0]["path"]} if modules else {}
    config = AutoConfig.from_pretrained(name, **place)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    trunk, layers = find_layers(model)
    text: Any = trunk.config
    tokenizer = AutoTokenizer.from_pretrained(name, **place)
    limits = [tokenizer.model_max_length, getattr(text, "max_position_embeddings", None)]
    known = [limit for limit in limits if limit and limit < 10**9]
    hidden = text.hidden_size
    try:
        encoder = is_encoder(trunk, layers)
    except ValueError as error:  # it can be measured alone, with its weights
        raise ValueError(
            f"the code of {name} does not say whether it reads in both directions; write the config by hand, from "
            "configs/quick.yaml"
        ) from error
    return Base(
        sum(p.numel() for p in model.parameters()), len(layers), hidden,  # type: ignore[arg-type]
        getattr(text, "intermediate_size", None) or 4 * hidden, encoder, modules is not None,
        min(known, default=None), tokenizer,
    )  # fmt: skip


def _check_weights(name: str) -> None:
    folder = Path(name)
    if folder.is_dir() and not any(folder.rglob("*.safetensors")) and not any(folder.rglob("pytorch_model*.bin")):
        raise ValueError(f"{name} has a config and no weights (*.safetensors or pytorch_model*.bin); copy it whole")


def look_at_data(source: str, base: Base) -> Data:
    """Every row checked, as in training; lengths of a sample drawn at random."""
    import numpy as np

    from .data import load_pairs
    from .prompts import fitting_prompts

    pairs = load_pairs(source)
    rows = np.sort(np.random.default_rng(0).permutation(len(pairs))[:SAMPLED])
    sample = {name: pairs.select(rows)[name] for name in pairs.column_names}
    prompts: dict[str, str] = {}
    if base.tuned:
        reason = "none: the base was trained for embeddings, with prompts of its own if its card says so"
    else:
        prompts, reason = fitting_prompts(list(sample["anchor"]), list(sample["positive"]))
    lengths = {}
    for name, texts in sample.items():
        prompt = prompts.get("query", "") if name == "anchor" else ""
        ids = base.tokenizer([prompt + text for text in texts], verbose=False)["input_ids"]
        counts = [len(one) + 1 for one in ids]  # EOS, where the tokenizer does not put it
        lengths[name] = math.ceil(np.percentile(counts, 95)), max(counts)
    summary = str(pairs.info.description or "").splitlines()
    return Data(len(pairs), summary, len(pairs.column_names) - 2, lengths, prompts, reason)


def look_at_machine() -> Machine:
    import torch

    from .memory import free_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(device.type, free_bytes(device), device.type == "cuda" and torch.cuda.is_bf16_supported())


# --- deciding ---------------------------------------------------------------------------------------------------------


def pick_design(base: Base, steps: int) -> tuple[str, str]:
    """A design for a base, with the reason; docs/designs.md and the README have the numbers."""
    if base.encoder and base.tuned:
        return "mean-bidirectional", "an encoder trained for embeddings: after training no pool was above its mean"
    if base.encoder:
        return "multi-layer-bidirectional", "a raw encoder: the pool starts at exactly mean pooling"
    if base.tuned:
        return "eos-causal", "a decoder trained for embeddings, most of which read the last token: see its card"
    if steps < ENOUGH_STEPS:
        return (
            "multi-layer-causal-mean",
            f"a raw decoder, whose last layer predicts tokens: all layers; causal, as {steps} steps do not teach it to "
            "read in both directions",
        )
    return "multi-layer-bidirectional", "a raw decoder, whose last layer predicts tokens: all layers, both directions"


def pick_length(base: Base, data: Data) -> tuple[int, str]:
    """max_seq_length: what holds 95 % of each column, all where that takes little more, within what the base takes."""
    most, longest = (max(numbers) for numbers in zip(*data.lengths.values(), strict=True))
    wanted = 8 * math.ceil((longest if longest <= LITTLE_MORE * most else most) / 8)
    length = max(8, min(wanted, base.limit or wanted))
    columns = ", ".join(f"{name} {most} (longest {longest:,})" for name, (most, longest) in data.lengths.items())
    limit = f"; the base takes {base.limit:,}" if base.limit else ""
    return length, f"tokens, prompt and EOS counted; 95 % are within: {columns}{limit}"


def pick_batch(base: Base, data: Data, machine: Machine) -> tuple[int, str]:
    """Pairs a batch: many negatives, and at least twenty steps through the data."""
    most = 256 if machine.device == "cuda" else 64 if base.parameters < 50_000_000 else 32
    batch = min(most, max(2, 1 << (max(1, data.pairs // 20).bit_length() - 1)))
    negatives = batch * (1 + data.negatives) - 1
    why = f"at most {most} on a {machine.device}" if batch == most else f"20 steps through {data.pairs:,} pairs"
    return batch, f"{negatives} negatives an anchor; gradients are cached, so memory does not bound it: {why}"


def trained_bytes(base: Base) -> int:
    """Of float32 weights, their gradients and Adam's two moments."""
    return 16 * base.parameters


def pick_lora(base: Base, machine: Machine) -> tuple[bool, str]:
    """Whether LoRA, with what training all weights would take."""
    need, free = trained_bytes(base), machine.free
    numbers = f"all weights with gradients and Adam are {need / 1e9:.1f} GB in float32, {free / 1e9:.1f} GB are free"
    if base.parameters > LARGEST_WHOLE:
        return True, f"on: {base.parameters / 1e9:.1f} G parameters; {numbers}"
    if base.raw_decoder:
        return True, f"on: no worse for a raw decoder in few steps (docs/designs.md), a folder of MB; {numbers}"
    return need > free / 2, f"{'on' if need > free / 2 else 'off'}: {numbers}"


def pick_rate(base: Base, lora: bool) -> tuple[float, str]:
    """The learning rate of all but the pool."""
    if not lora:
        return 2e-5, "usual of all weights; the pool has its own"
    if base.raw_decoder and base.parameters < SMALL:
        return 1e-3, "LoRA's on SmolLM2-135M and Gemma 3 270M (docs/designs.md); the pool has its own"
    return 1e-4, "usual of LoRA; the pool has its own"


def token_bytes(base: Base, machine: Machine) -> int:
    """What a backward keeps of one token, about: of each layer ten rows of the hidden size and four of the wide one."""
    return base.layers * (10 * base.hidden + 4 * base.wide) * (2 if machine.half else 4)


def pick_mini_batch(base: Base, machine: Machine, lora: bool, length: int) -> tuple[int, str]:
    """Tokens whose activations are kept at a time: a quarter of what the weights leave, a power of two."""
    weights = base.parameters * (2 if lora and machine.half else 4) if lora else trained_bytes(base)
    each = token_bytes(base, machine)
    room = max(0, machine.free - weights) // 4 // each
    tokens = min(MOST_TOKENS, max(LEAST_TOKENS, 1 << max(0, room.bit_length() - 1)))
    tokens = max(tokens, 1 << (length - 1).bit_length())
    return tokens, (
        f"tokens computed at a time; about {tokens * each / 1e9:.1f} GB of activations beside {weights / 1e9:.1f} GB "
        f"of weights and optimizer, {machine.free / 1e9:.1f} GB are free"
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def compose(base: str, data: str, output_dir: str, looked: Base, found: Data, machine: Machine) -> str:
    """The config as text, a comment with the reason above each value."""
    batch, batch_why = pick_batch(looked, found, machine)
    steps = max(1, found.pairs // batch)
    design, design_why = pick_design(looked, steps)
    length, length_why = pick_length(looked, found)
    lora, lora_why = pick_lora(looked, machine)
    tokens, tokens_why = pick_mini_batch(looked, machine, lora, length)
    kind = f"{'an embedding' if looked.tuned else 'a raw'} {'encoder' if looked.encoder else 'decoder'}"
    rate, rate_why = pick_rate(looked, lora)
    lines = [
        f"# Written by mlpool init. {plain(base)}: {kind}, {looked.parameters / 1e6:,.0f} M parameters, "
        f"{looked.layers} layers of {looked.hidden}.",
        *(f"# {line}" for line in found.summary),
        "#   mlpool train THIS --dry-run   checks all of it; --key value on the command line overrides any value.",
        _value("model", base),
        *_explained("design", design, design_why),
        *_explained("max_seq_length", length, length_why),
        *_explained("prompts", found.prompts or None, found.prompts_reason),
        "",
        "# checkpoints, then the trained embedder",
        _value("output_dir", output_dir),
        "",
        _value("data", {"train": data}),
        "# duplicates: a text that is twice in a batch is no negative of itself",
        *_explained("loss", {"mini_batch_tokens": tokens, "false_negatives": "duplicates"}, tokens_why),
        *_explained("lora", {"rank": 16, "alpha": 32} if lora else None, lora_why),
        "",
        *_explained("per_device_train_batch_size", batch, batch_why),
        *_explained("num_train_epochs", 1, f"{steps:,} steps; more epochs where the dev score still rises"),
        *_explained("learning_rate", rate, rate_why),
        *_explained("warmup_steps", math.ceil(steps / 10), "a tenth of the steps"),
        *_explained("save_steps", max(1, steps // 4), "a killed run goes on from the last with --resume"),
        _value("save_total_limit", 2),
        *(
            _explained("bf16", True, "weights stay as they are, products are bfloat16")
            if machine.half
            else _explained("dtype", "float32", f"this {machine.device} has no fast bfloat16")
        ),
    ]
    return "\n".join(lines) + "\n"


def _explained(key: str, value: Any, why: str) -> list[str]:
    """A comment and the value; of None the comment alone says what is left out."""
    return [f"# {why}", _value(key, value)] if value is not None else [f"# {key}: {why}"]


def _value(key: str, value: Any) -> str:
    import yaml

    if key == "prompts":  # in one line, its line ends written out
        return f"{key}: {json.dumps(value, ensure_ascii=False)}"
    text: str = yaml.safe_dump({key: value}, allow_unicode=True, sort_keys=False, width=10**6)
    return text.rstrip("\n")
