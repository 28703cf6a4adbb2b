"""The first module of an embedder: texts → tokens → transformer → what its design's pool reads."""

import functools
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn

from ..attention import bidirectional, causal
from ..attention.check import AttentionCheckError, claims_bidirectional, is_encoder
from ..attention.families import backend_of, family_of, require_transformers
from ..attention.packed import _position_offset, is_packed, pack, unpack
from ..attention.probe import embedding_table, text_positions
from ..files import read_json
from ..pooling.base import check_choice, check_positive, check_token_pooling, log_once, running_dtype
from ..quantized import made_on_loading, quantization_config
from ..schema import arguments, check, section
from ..taps import Taps
from ..trunk import argument_names, find_layers
from .adapters import fingerprint, has_adapter
from .base_model import hub_options, load_model
from .depth import cut
from .designs import DESIGNS, find_design
from .folder import MANIFEST, check_folder
from .texts import TextTokenizer, TokenIds, Truncated

CONFIG_NAME = "backbone_config.json"
PACKING = ("auto", "always", "never")


def _of_texts(name: str, meaning: str) -> Any:
    """A setting of the backbone's `TextTokenizer`, as one of its own."""
    return property(
        lambda self: getattr(self.texts, name), lambda self, value: setattr(self.texts, name, value), doc=meaning
    )


class Backbone(InputModule):
    """A decoder or encoder with its tokenizer, as one design needs it. Input module of a SentenceTransformer.

    Args:
        model: a bare transformers model (AutoModel); made causal or bidirectional here. tokenizer: of that model.
        layers: to tap, for designs that read all; None for all. depth: how many are kept, None for the whole model.
        skip_tokens: first tokens of a text that are left out of the mean of each layer, as the pool is told too.
        The others are as of `mlpool.load`.

    Raises:
        ValueError: a causal design on an encoder, and what `bidirectional`, `TextTokenizer`, `find_layers` raise.
    """

    config_file_name = CONFIG_NAME
    older: ClassVar[dict[str, Any]] = {"depth": None}  # as `mlpool.pooling.base.Pool.older`
    config_keys: list[str] = [  # noqa: RUF012  (declared so by sentence-transformers)
        "design", "layers", "max_seq_length", "append_eos", "include_prompt", "include_bos", "packing",
        "sliding_window", "skip_tokens", "depth",
    ]  # fmt: skip
    save_in_root = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        design: str,
        layers: Sequence[int] | None = None,
        max_seq_length: int | None = None,
        append_eos: bool = True,
        include_prompt: bool = True,
        include_bos: bool = True,
        packing: str = "auto",
        sliding_window: str = "keep",
        skip_tokens: int = 0,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("packing", packing, PACKING)
        if max_seq_length is not None:
            check_positive(max_seq_length=max_seq_length)
        self.model, self.depth = model if depth is None else cut(model, depth), depth
        self._design = find_design(design)
        self.design, self.append_eos, self.packing = self._design.name, append_eos, packing
        self.sliding_window, self.layers = sliding_window, None if layers is None else list(layers)
        if skip_tokens:
            check_token_pooling(self._design.token_pooling, skip_tokens)
        self.skip_tokens = skip_tokens
        self.texts = self._text_tokenizer(tokenizer, include_prompt, include_bos)
        self.max_seq_length = self._limit() if max_seq_length is None else max_seq_length
        self.attn_implementation = backend_of(find_layers(model)[0].config)
        self.untuned = False  # a language model as it was pretrained: where `build_pool` starts a default pool
        self.base_fingerprint: str | None = None  # of the base model, once there is an adapter on it
        self._arranged_for: tuple[torch.device, torch.dtype, str] | None = None
        self._one_at_a_time = _Lock()
        self._set_attention()

    # --- texts to tokens ----------------------------------------------------------------------------------------------

    def token_ids(self, texts: Sequence[str], prompt: str | None = None, max_length: int | None = None) -> TokenIds:
        """Token ids of each text, framed and cut; see `TextTokenizer`."""
        return self.texts(texts, prompt, max_length or self.max_seq_length)

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, max_length: int | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """input_ids and attention_mask, int64 [B, T], padded on the right; called by sentence-transformers."""
        tokens = self.token_ids(inputs, prompt, max_length)
        return tokens.padded(range(len(tokens.ids)), self.texts.pad)

    # --- tokens to states ---------------------------------------------------------------------------------------------

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Run the model.

        Args:
            features: input_ids [B, T] and attention_mask [B, T], padding on either side; or input_ids [1, total] and
                cu_seqlens [B+1] on a packed model; token_mask [B, T] or [total]: 0 is not pooled.

        Returns: features with token_embeddings, the last hidden state [B, T, D] or [1, total, D], and, for designs that
            read all layers, layer_states [B, L, D].
        """
        with self._one_at_a_time:
            return self._run(features)

    def _run(self, features: dict[str, Any]) -> dict[str, Any]:
        self.arrange()
        call: dict[str, Any] = {"input_ids": features["input_ids"]}
        token_mask = features.get("token_mask")
        if "cu_seqlens" in features:
            if not self.packed:  # it would read all texts as one
                raise ValueError(
                    "got packed texts (cu_seqlens), and this model runs padded; pass input_ids [B, T], attention_mask"
                )
            call |= {"cu_seq_lens_q": features["cu_seqlens"], "cu_seq_lens_k": features["cu_seqlens"]}
        else:
            mask = call["attention_mask"] = features["attention_mask"]
            if not self.packed:
                if self._counts_padding:
                    call["position_ids"] = text_positions(mask)
            elif token_mask is not None:  # the layers see the packed row
                token_mask = token_mask[mask.bool()]
        if self._takes_cache:
            call["use_cache"] = False
        with self._taps() as taps:
            if taps is not None:
                taps.expect(token_mask=token_mask)
            features["token_embeddings"] = self.model(**call).last_hidden_state
            if taps is not None:
                features["layer_states"] = taps.take()
        return features

    def _taps(self) -> Any:
        # Only while the model runs: a tapped model cannot be pickled, and multi-process encoding pickles it.
        if not self._design.reads_all_layers:
            return nullcontext()
        return Taps(self.model, self._design.token_pooling, self.layers, self.skip_tokens, self.reads_final_norm)

    @property
    def reads_final_norm(self) -> bool:
        """Whether the last state is pooled, behind the final norm; a cut model's layers are read raw, see depth.py."""
        return self.depth is None or not self._design.reads_all_layers

    # --- attention ----------------------------------------------------------------------------------------------------

    def _set_attention(self) -> None:
        require_transformers()
        trunk, layers = find_layers(self.model)
        encoder = is_encoder(trunk, layers)
        self._takes_cache = hasattr(trunk.config, "use_cache") and not encoder
        self._counts_padding = _counts_padding(trunk)
        self.hidden_size: int = trunk.config.hidden_size
        self.num_layers = len(layers)
        if self._design.attention == "bidirectional":
            if not encoder:
                bidirectional(self.model, sliding_window=self.sliding_window)
        elif encoder:
            fitting = ", ".join(name for name, design in DESIGNS.items() if design.attention == "bidirectional")
            raise ValueError(
                f"{self.design} needs a causal decoder, and {trunk.config.model_type} is an encoder, which reads both "
                f"directions; choose one of {fitting}"
            )
        elif claims_bidirectional(trunk, layers):
            causal(self.model)

    def arrange(self) -> None:
        """Pack or unpack the model as its device and precision suit; by forward, and by trainers before they shard."""
        weight = self.model.get_input_embeddings().weight  # type: ignore[operator]
        dtype = running_dtype(weight)
        now = (weight.device, dtype, self.packing)
        with self._one_at_a_time:
            if self._arranged_for == now:
                return
            # On a GPU in full precision no kernel takes packed texts, and they would run one by one.
            wins = weight.device.type == "cpu" or dtype in (torch.float16, torch.bfloat16)
            if self.packing == "always" or (self.packing == "auto" and wins):
                self._pack()
            else:
                unpack(self.model)
            self._arranged_for = now

    @property
    def packed(self) -> bool:
        return is_packed(self.model)

    def _pack(self) -> None:
        try:
            pack(self.model)
        except (ValueError, AttentionCheckError) as error:
            if self.packing == "always":
                raise
            log_once(f"running with padding, which costs time where texts differ in length: {error}")

    # --- truncation, sizes --------------------------------------------------------------------------------------------

    def _limit(self) -> int | None:
        """The smaller of the tokenizer's and the model's limit."""
        trunk, _ = find_layers(self.model)
        positions = getattr(trunk.config, "max_position_embeddings", None) or 0
        limits = [limit for limit in (self.texts.limit(), positions - _position_offset(trunk)) if limit and limit > 0]
        return min(limits, default=None)

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """The Hugging Face tokenizer; another one is framed anew."""
        return self.texts.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.texts = self._text_tokenizer(tokenizer, self.include_prompt, self.include_bos)

    def _text_tokenizer(self, tokenizer: Any, include_prompt: bool, include_bos: bool) -> TextTokenizer:
        vocabulary = embedding_table(self.model).weight.shape[0]
        return TextTokenizer(tokenizer, self.append_eos, include_prompt, include_bos, vocabulary)

    include_prompt = _of_texts("include_prompt", "Whether the prompt's tokens are pooled, or only read by the model.")
    include_bos = _of_texts("include_bos", "Whether the tokens that the tokenizer puts before a text are pooled.")

    @property
    def truncated(self) -> Truncated:
        """What has been cut since `reset_truncated`."""
        return self.texts.truncated

    def reset_truncated(self) -> None:
        self.texts.truncated = Truncated()

    # --- save and load ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        hidden = ("base_fingerprint", "quantization")
        shown = {name: value for name, value in self.get_config_dict().items() if name not in hidden}
        return f"{type(self).__name__}({shown})"  # which a model card holds too; the fingerprint has kilobytes

    def get_config_dict(self) -> dict[str, Any]:
        values = {key: getattr(self, key) for key in self.config_keys}
        if self._design.package:  # of a design of somebody's own, so that a machine without it can say what it lacks
            values["design_package"] = self._design.package
        if has_adapter(self.model):
            values["base_fingerprint"] = self.base_fingerprint or fingerprint(self.model)
            if (quantization := made_on_loading(self.model)) is not None:
                values["quantization"] = quantization  # of a base that is not saved with it
        return values

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """Write the model (its adapter alone where it has one), the tokenizer and `backbone_config.json`."""
        (Path(output_path) / MANIFEST).unlink(missing_ok=True)  # of files that are about to be replaced
        self.model.save_pretrained(output_path)  # type: ignore[operator]
        self.tokenizer.save_pretrained(output_path)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> Self:  # type: ignore[override]
        """Load what `save` wrote; called by sentence-transformers with its usual arguments."""
        hub = hub_options(options)
        check_folder(model_name_or_path)
        path = cls.load_file_path(model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
        config = {} if path is None else check(_config_keys(), read_json(path), str(path))
        if "design" not in config:
            raise ValueError(f"{model_name_or_path} lacks {CONFIG_NAME} or its design; it is not a saved embedder")
        find_design(config["design"], config.pop("design_package", None))  # before the weights are read
        expected = config.pop("base_fingerprint", None)
        if (quantization := config.pop("quantization", None)) is not None:
            given = options.get("model_kwargs") or {}
            options["model_kwargs"] = {**given, "quantization_config": quantization_config(quantization)}
        model, tokenizer = load_model(
            model_name_or_path, {**hub, "trust_remote_code": options.get("trust_remote_code", False)},
            options.get("model_kwargs"), subfolder, options.get("processor_kwargs"), options.get("config_kwargs"),
            expected, config.get("depth"),
        )  # fmt: skip
        backbone = cls(model, tokenizer, **config)
        backbone.base_fingerprint = expected
        return backbone


@functools.cache
def _config_keys() -> Any:
    """What `backbone_config.json` may hold."""
    keys = arguments(Backbone, "model", "tokenizer")
    more = {"design_package": str, "base_fingerprint": str | None, "quantization": dict[str, Any]}
    return section("key", {**keys, **more})


def _counts_padding(trunk: nn.Module) -> bool:
    """Whether its learned positions count from the start of the row, padding included, unless they are given."""
    learned = any(
        name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is None
        for name, module in trunk.named_modules()
    )
    return "position_ids" in argument_names(trunk) and (learned or family_of(trunk.config).text_positions)


class _Lock:
    """Lets one forward at a time through: taps are attached to the model itself. Copies and pickles get their own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> Any:
        return _Lock, ()
