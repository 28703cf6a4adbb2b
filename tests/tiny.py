"""Tiny random models of five families, with tokenizers that frame a text in every way; shared by the tests here.

There is no conftest.py in this folder: other folders' tests import from `conftest` and would get this one.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mlpool.embedder import DESIGNS, Embedder, load

transformers.utils.logging.disable_progress_bar()
V, D, L = 320, 32, 4
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
PAD, BOS, EOS, UNK = range(4)
SMALL = {"num_latents": 6, "num_heads": 2, "head_dim": 8}
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 2}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 128}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", GATED),
    "llama": ("Llama", GATED),
    "gpt2": ("GPT2", {"vocab_size": V, "n_embd": D, "n_layer": L, "n_head": 2, "n_positions": 128}),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": D, "max_position_embeddings": 128}),
    "bert": ("Bert", {**SIZES, "intermediate_size": 48, "max_position_embeddings": 128}),
    "roberta": ("Roberta", {**SIZES, "intermediate_size": 48, "max_position_embeddings": 66, "pad_token_id": PAD}),
}
ENCODERS = ("bert", "roberta")
# What a tokenizer puts around a text.
FRAMES = {"bare": ([], []), "eos": ([], [EOS]), "bos": ([BOS], []), "both": ([BOS], [EOS])}
CAUSAL = [name for name, design in DESIGNS.items() if design.attention == "causal"]
BIDIRECTIONAL = [name for name, design in DESIGNS.items() if design.attention == "bidirectional"]
TEXTS = [
    "how many layers does the pool read",
    "a",
    "",
    "   ",
    "Zürich, 東京 🙂",
    "all of them, and the last one twice over if it is asked to",
    "tabs\tand\nlines",
]


def tokenizer(frame: str = "bare", **options: Any) -> Any:
    """A byte-level BPE tokenizer of V tokens whose post-processor frames a text; options are of its class."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=V, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    bpe.train_from_iterator(["how many layers does the pool read all of them and the last one twice"] * 5, trainer)
    before, behind = FRAMES[frame]
    if before or behind:
        template = " ".join([*(SPECIAL[i] for i in before), "$A", *(SPECIAL[i] for i in behind)])
        bpe.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(SPECIAL[i], i) for i in (BOS, EOS)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, **{"bos_token": "<s>", "eos_token": "</s>", **options}
    )


def transformer(family: str = "qwen2", dtype: torch.dtype = torch.float32, **changes: Any) -> torch.nn.Module:
    """A random AutoModel in evaluation mode, in which no parameter is zero."""
    torch.manual_seed(0)
    prefix, sizes = CONFIGS[family]
    model = getattr(transformers, f"{prefix}Model")(getattr(transformers, f"{prefix}Config")(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


_ROOT = Path(tempfile.mkdtemp(prefix="mlpool-tiny-"))
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)


@functools.cache
def base(
    family: str = "qwen2", frame: str | None = None, dtype: torch.dtype = torch.float32, num_hidden_layers: int = L
) -> Path:
    """The folder of a base model with its tokenizer. Tests must not write into it."""
    folder = _ROOT / f"{family}-{frame}-{str(dtype).removeprefix('torch.')}-{num_hidden_layers}"
    transformer(family, dtype, num_hidden_layers=num_hidden_layers).save_pretrained(folder)
    frame = frame or ("both" if family in ENCODERS else "bare")
    tokenizer(frame, **({"pad_token": "<pad>"} if family in ENCODERS else {})).save_pretrained(folder)
    return folder


def embedder(design: str = "multi-layer-bidirectional", family: str = "qwen2", **options: Any) -> Embedder:
    """A fresh embedder of `base(family)` whose pool has left its start: gate, weights and norms are random."""
    if DESIGNS[design].has_latents:
        options.setdefault("pooler", SMALL)
    frame, dtype = options.pop("frame", None), options.pop("base_dtype", torch.float32)
    folder = base(family, frame, dtype, options.pop("num_hidden_layers", L))
    torch.manual_seed(0)  # of the pool's start
    made = load(folder, design, device="cpu", **options)
    shake(made[1])
    return made


def passages() -> list[str]:
    """Texts of one word to 233, for a real base: those of this file."""
    words = Path(__file__).read_text(encoding="utf8").split()
    return [" ".join(words[i : i + n]) for i, n in enumerate((1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233))]


def shake(module: torch.nn.Module, scale: float = 0.3, only: str = "") -> torch.nn.Module:
    """Move every parameter (whose name holds `only`) off its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((scale * noise).to(parameter.dtype))
    return module
