"""What encode.py and train_step.py compare: three ways from the same texts to embeddings, over the same weights.

    eager                  the paper's pipeline as it is written today: sentence-transformers' Transformer with
                           output_hidden_states=True on a padded batch, then the released equations in eager PyTorch
                           (mlpool_kernels.reference: every hidden state stacked, masked mean or EOS, the pooler)
    sentence-transformers  its Transformer and its mean pooling: no pool to train, the cheapest peer there is
    mlpool                 the embedder that `mlpool.load` makes

and, in encode.py on a GPU, two stronger peers:

    compiled                    eager under torch.compile, layer by layer and the pool, for any shapes
    sentence-transformers fp16  in half precision, without padding where it can: that takes flash-attn

The first three share every parameter, the tokenizer, dtype, threads, attention implementation (sdpa) and direction; all
but mlpool also sentence-transformers' own loop (sorted by length, batches of a fixed size). Nothing is downloaded: the
weights are random, a tokenizer is made of numbered words.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from cases import Case, Preset
from measure import (
    Clock,
    Row,
    Skipped,
    add_run_arguments,
    device_name,
    device_slug,
    facts,
    free_memory,
    number,
    progress,
    quantiles,
    start,
)
from mlpool_kernels import reference
from rows import Rows
from torch import Tensor, nn
from work import needed_bytes, randomised

try:
    import sentence_transformers
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Module, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    from mlpool import bidirectional, causal
    from mlpool.embedder import DESIGNS, Embedder, add_lora
    from mlpool.embedder.backbone import Backbone
    from mlpool.embedder.designs import build_pool
    from mlpool.embedder.pooler import Pooler
    from mlpool.taps import find_layers
except ModuleNotFoundError as error:
    raise SystemExit(f"this benchmark needs {error.name}: pip install 'mlpool[train]'") from error
except ImportError as error:  # too old
    raise SystemExit(f"this benchmark cannot run: {error}") from error

BOTH, LAST = DESIGN_NAMES = ("multi-layer-bidirectional", "multi-layer-causal")  # the paper's designs 5 and 3
POOLERS = ("default", "paper")
EAGER, PEER, OURS = "eager", "sentence-transformers", "mlpool"
COMPILED, HALF = "compiled", "sentence-transformers fp16"
# Share of the free memory that an estimate may fill.
FILL = 0.85
# Embeddings are looked up, so the vocabulary costs nothing and is cut.
VOCABULARY, MAX_TOKENS = 2048, 512
_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Size(NamedTuple):
    """A backbone. kind: transformers' model type. config: its sizes."""

    kind: str
    config: dict[str, Any]


def _decoder(hidden: int, layers: int, heads: int, key_heads: int, width: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "intermediate_size": width, "sliding_window": None,
    }  # fmt: skip


def _encoder(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"intermediate_size": 4 * hidden, **_DROPOUT}


SIZES = {
    "tiny": Size("qwen2", _decoder(64, 3, 4, 2, 128)),
    "minilm": Size("bert", _encoder(384, 6, 12)),
    "qwen2-0.5b": Size("qwen2", _decoder(896, 24, 14, 2, 4864)),
    "mistral-7b": Size("mistral", _decoder(4096, 32, 32, 8, 14336)),
    "mistral-7b-8-layers": Size("mistral", _decoder(4096, 8, 32, 8, 14336)),  # for cards that do not hold all 32
}


# --- texts ------------------------------------------------------------------------------------------------------------


def lengths_of(name: str, count: int) -> list[int]:
    """Tokens of each text, EOS counted: all `name` of them, or log-normal ones of 8 to 256 for "mixed"."""
    if name != "mixed":
        return [int(name)] * count
    draw = random.Random(0)
    return [min(max(round(draw.lognormvariate(3.9, 0.8)), 8), 256) for _ in range(count)]


def texts_of(lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Random words, one token each; the last token is the tokenizer's EOS."""
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(length - 1)) for length in lengths]


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = {"[PAD]": 0, "[EOS]": 1, "[UNK]": 2}
    words = Tokenizer(WordLevel(special | {f"w{i}": i for i in range(3, VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", model_max_length=MAX_TOKENS
    )


# --- models -----------------------------------------------------------------------------------------------------------


def config_of(size: str) -> Any:
    from transformers import AutoConfig

    kind, sizes = SIZES[size]
    return AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, pad_token_id=0, max_position_embeddings=MAX_TOKENS, **sizes
    )


def weights_of(size: str) -> int:
    """How many weights a backbone has, its vocabulary cut."""
    from transformers import AutoModel

    with torch.device("meta"):
        return int(AutoModel.from_config(config_of(size)).num_parameters())


def random_base(size: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """sentence-transformers' Transformer around a model of random weights."""
    from transformers import AutoConfig, AutoModel

    transformers.utils.logging.disable_progress_bar()
    kind = SIZES[size].kind
    # It loads from a folder only. A small stand-in goes there: some types (Qwen2) come back with another tokenizer.
    stand_in = "bert" if kind == "bert" else "mistral"
    small = SIZES["tiny"].config if stand_in == "mistral" else _encoder(64, 1, 4)
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config(AutoConfig.for_model(stand_in, vocab_size=VOCABULARY, **small)).save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        base = Transformer(folder, max_seq_length=MAX_TOKENS)
    config = config_of(size)
    config.use_cache = False  # sentence-transformers sets it so on what it loads
    torch.manual_seed(0)
    with device:
        base.model = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    return base


def loaded_base(folder: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The same around a real model: a folder or a name on the Hub."""
    base = Transformer(folder, model_kwargs={"dtype": dtype, "attn_implementation": "sdpa"})
    base.model.to(device).eval()
    if base.tokenizer.pad_token is None:
        base.tokenizer.pad_token = base.tokenizer.eos_token
    # Where a tokenizer has a chat template, sentence-transformers wraps every text in it without a word.
    if base.modality_config.pop("message", None):
        base.input_formatter.supported_modalities = list(base.modality_config)
        progress("the chat template is left out: a text is compared as it is")
    end_with_eos(base.tokenizer)
    base.max_seq_length = min(MAX_TOKENS, base.max_seq_length or MAX_TOKENS)
    return base


def end_with_eos(tokenizer: Any) -> None:
    """Have a fast tokenizer close every text with its EOS, as the paper and mlpool do, unless it does so already."""
    from tokenizers import processors

    if tokenizer("a")["input_ids"][-1:] in ([tokenizer.eos_token_id], [tokenizer.sep_token_id]):
        return
    eos = tokenizer.eos_token
    closing = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A $B {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    own = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = closing if own is None else processors.Sequence([own, closing])


def build(base: Transformer, design: str, pooler: str, lora: int | None = None) -> dict[str, SentenceTransformer]:
    """The three providers; lora: its rank, for training. The pool's gate and norms are moved away from their start."""
    model = base.model
    device = str(model.device)
    backbone = Backbone(share(model), base.tokenizer, design, max_seq_length=base.max_seq_length)
    torch.manual_seed(1)
    with torch.device(device):
        pool = build_pool(DESIGNS[design], backbone.hidden_size, backbone.num_layers, pooler)
    pool = randomised(pool.to(model.dtype))
    ours = Embedder(modules=OrderedDict(backbone=backbone, pooler=Pooler(pool)), device=device)
    if lora is not None:
        # The paper's but for dropout: random numbers would differ between padded and packed batches.
        add_lora(ours, rank=lora, alpha=2 * lora, dropout=0.0)
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:  # starts at zero, where it hides the gradient of lora_A
                nn.init.normal_(parameter, std=0.02)

    def transformer(**settings: Any) -> Transformer:
        module = share(base)
        module.model = share(backbone.model)  # with its direction and adapter
        for name, value in settings.items():
            setattr(module.model.config, name, value)
        return module

    eager = SentenceTransformer(modules=[transformer(output_hidden_states=True), EagerPool(pool)], device=device)
    peer = SentenceTransformer(modules=[transformer(), Pooling(backbone.hidden_size, "mean")], device=device)
    return {EAGER: eager, PEER: peer, OURS: ours}


def compiled(eager: SentenceTransformer) -> SentenceTransformer:
    """The eager pipeline under torch.compile: each layer, as one graph serves them all, and the pool."""
    # Beyond its limit of graphs the compiler would go on uncompiled, silently.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.reset()
    transformer, pool = (share(module) for module in eager)
    for layer in find_layers(transformer.model)[1]:
        layer.compile(dynamic=True)
    pool.compute = torch.compile(pool.compute, dynamic=True)
    return SentenceTransformer(modules=[transformer, pool], device=str(eager.device))


def half_precision(peer: SentenceTransformer, design: str) -> tuple[SentenceTransformer, str]:
    """sentence-transformers' mean pooling in float16 without padding, or why it is padded."""
    transformer, pooling = copy.deepcopy(peer[0]).half(), copy.deepcopy(peer[1])
    why = ""
    try:
        transformer.model.set_attn_implementation("flash_attention_2")
        (bidirectional if DESIGNS[design].attention == "bidirectional" else causal)(transformer.model)
        transformer.unpad_inputs = True
    except (ImportError, ValueError) as error:
        missing = importlib.util.find_spec("flash_attn") is None
        why = "padded: flash-attn is not installed" if missing else f"padded: {error}".splitlines()[0][:160]
    if not why and not transformer.can_flatten_inputs:
        why = "padded: sentence-transformers does not unpad this model"
    return SentenceTransformer(modules=[transformer, pooling], device=str(peer.device)), why


class EagerPool(Module):
    """The reference over the parameters of one of our pools."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.compute: Callable[..., Tensor] = _reference
        # Not the pool itself, whose folded weights would be dropped with every eval() of this module.
        self.shared = nn.ParameterDict(dict(pool.named_parameters()))
        self.num_heads, self.token_pooling = pool.num_heads, pool.token_pooling

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        states = features.pop("all_layer_embeddings")[1:]
        features["sentence_embedding"] = self.compute(
            states, features["attention_mask"], dict(self.shared), self.num_heads, self.token_pooling
        )
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        raise NotImplementedError("a benchmark's provider is not saved")


def _reference(*args: Any) -> Tensor:
    return reference.multi_layer_pool(*args)


def share(module: Any) -> Any:
    """A copy of a module with the parameters of the original itself."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def execution(backbone: Any) -> str:
    """Whether padding is computed: of our Backbone, or of sentence-transformers' Transformer."""
    packed = backbone.packed if hasattr(backbone, "packed") else backbone.can_flatten_inputs
    return "packed" if packed else "padded"


def check_tokens(providers: dict[str, SentenceTransformer], texts: Sequence[str]) -> list[int]:
    """Tokens of each text; RuntimeError where the providers do not see the same."""
    seen = {}
    for name, model in providers.items():
        features: Any = model[0].preprocess(list(texts))  # type: ignore[operator]
        seen[name] = [ids[mask.bool()].tolist() for ids, mask in zip(*map(features.get, _INPUTS), strict=True)]
    if any(tokens != seen[EAGER] for tokens in seen.values()):
        raise RuntimeError("the providers do not see the same tokens, so their speeds do not compare")
    return [len(ids) for ids in seen[EAGER]]


_INPUTS = ("input_ids", "attention_mask")


def eager_bytes(model: Any, mode: str, texts: int, tokens: int) -> int:
    """An estimate of what eager's pool takes for a padded batch, by the pool of our embedder."""
    pool = model[1].pool
    preset = Preset("multi", pool.hidden_size, pool.num_layers, pool.num_latents == 768, pool.token_pooling)
    return needed_bytes(Case("", texts, mode, tokens=tokens), preset, texts, 0, pool.latents.dtype.itemsize)


@torch.no_grad()
def mean_reference(eager: SentenceTransformer, texts: Sequence[str]) -> Tensor:
    """What sentence-transformers' mean pooling must give: the masked mean of the eager pipeline's last state [N, D]."""
    features: Any = eager[0].preprocess(list(texts))  # type: ignore[operator]
    features = {k: v.to(eager.device) if isinstance(v, Tensor) else v for k, v in features.items()}
    mask = features["attention_mask"]
    last = eager[0](features)["all_layer_embeddings"][-1]
    return reference.gather([last], mask, "mean")[:, 0]


# --- a run ------------------------------------------------------------------------------------------------------------


class Bench:
    """What a run of either benchmark has: a device, one backbone at a time, and its rows on disk.

    Args:
        benchmark: its name, for the file.
        args: of `add_arguments`. budget: seconds for a provider, calls of it at most, seconds of a call beyond which
            there is no second one: in a quick and in a full run on a CPU, and on a GPU.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace, budget: Sequence[tuple[float, int, float]]) -> None:
        self.args, self.device = args, start(args)
        gpu = self.device.type == "cuda"
        self.full = args.full or args.all or (gpu and not args.quick)
        self.dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
        self.low = self.dtype in (torch.bfloat16, torch.float16)
        self.budget, self.most, self.slow = budget[2 if gpu else self.full]
        versions = {m.__name__: m.__version__ for m in (transformers, sentence_transformers)}
        self.clock, self.facts = Clock(self.device), facts(self.device) | versions
        name = f"{benchmark}-{device_slug(self.device)}-{'full' if self.full else 'quick'}.csv"
        self.rows = Rows(args.results / name, self.facts, args.again)
        self.base: Any = None
        self.base_name = ""
        print(
            f"{device_name(self.device)}, {torch.get_num_threads()} threads, {str(self.dtype)[6:]}, torch "
            f"{torch.__version__}, " + ", ".join(f"{k} {v}" for k, v in versions.items()), flush=True,
        )  # fmt: skip
        if not gpu and (busy := self.facts["load"] or 0.0) > 0.6:
            progress(f"load {busy:.1f} before the start: others use the cores, so no time here is to be trusted")

    def load(self, size: str, share: float = 1.0) -> None:
        """Have the backbone; `Skipped` where it does not fit. share: what is needed over its weights."""
        if self.base_name == size:
            return
        self.base, self.base_name = None, ""
        need, free = share * weights_of(size) * self.dtype.itemsize, free_memory(self.device)
        if need > FILL * free:
            raise Skipped(f"{size} needs {int(need) >> 20:,} MiB and {free >> 20:,} are free")
        progress(f"{size}: weights")
        self.base, self.base_name = random_base(size, self.device, self.dtype), size

    def chosen(self, cases: Sequence[Any], **wanted: Sequence[str] | None) -> list[Any]:
        """The cases that the arguments leave; a preset that no case has takes the place of the first case's.

        Args:
            wanted: attribute of a case -> values to keep, or None for all.
        """
        sizes = self.args.preset or []
        if missing := [size for size in sizes if size not in {case.size for case in cases}]:
            first = [case for case in cases if case.size == cases[0].size]
            cases = [*cases, *(replace(case, size=size, targets={}) for size in missing for case in first)]
        wanted |= {"size": sizes} | {name: getattr(self.args, name) for name in ("design", "pooler", "lengths")}
        left = [c for c in cases if all(not values or getattr(c, name) in values for name, values in wanted.items())]
        if self.device.type == "cpu" and not self.args.all:
            left = [case for case in left if not case.size.startswith("mistral-7b")]
        if not left:
            raise SystemExit(f"no case is left; there are: {', '.join(dict.fromkeys(case.name for case in cases))}")
        return left


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="every size and more texts; the default on a GPU")
    parser.add_argument("--quick", action="store_true", help="without mistral-7b; the default on a CPU")
    parser.add_argument("--all", action="store_true", help="mistral-7b on a CPU too")
    parser.add_argument("--preset", action="append", choices=SIZES, help="only this size; may be repeated")
    parser.add_argument("--design", action="append", choices=DESIGN_NAMES, help="only this one")
    parser.add_argument("--pooler", action="append", choices=POOLERS, help="only this one")
    parser.add_argument("--lengths", action="append", help="only these: tokens a text, or mixed")
    add_run_arguments(parser)


def keep(outputs: dict[str, Any], name: str, run: Callable[[], Any]) -> Callable[[], None]:
    """A call of `run` whose result is kept under `name`."""

    def call() -> None:
        outputs[name] = run()

    return call


def nothing() -> None:
    """Nothing to prepare."""


def timed(samples: Sequence[float], texts: int, extra: int) -> Row:
    """The columns of time and memory."""
    low, median, high = quantiles(samples)
    return {
        "runs": len(samples), "p20_ms": low * 1e3, "median_ms": median * 1e3, "p80_ms": high * 1e3,
        "texts_per_s": texts / median, "extra_mib": extra / 2**20,
    }  # fmt: skip


def spread(row: Row) -> str:
    return f"{number(row['p20_ms'])}-{number(row['p80_ms'])}" if row["runs"] > 1 else "1 run"
