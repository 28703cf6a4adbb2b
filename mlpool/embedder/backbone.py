"""The first module of an embedder: texts → tokens → transformer → what its design's pool reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn

from ..attention import bidirectional, causal
from ..attention.check import AttentionCheckError, claims_bidirectional, is_encoder
from ..attention.families import backend_of, require_transformers
from ..attention.packed import is_packed, pack, unpack
from ..pooling.base import check_choice, log_once
from ..taps import Taps, find_layers
from .adapters import check_base, fingerprint, has_adapter, load_adapter
from .designs import DESIGNS, find_design
from .folder import check_folder
from .texts import TextTokenizer, TokenIds, Truncated

CONFIG_NAME = "backbone_config.json"
_PACKING = ("auto", "always", "never")


class Backbone(InputModule):
    """A decoder or encoder with its tokenizer, as one design needs it. Input module of a SentenceTransformer.

    Args:
        model: a bare transformers model (AutoModel); made causal or bidirectional here.
        tokenizer: of that model.
        design: a name of `mlpool.embedder.designs.DESIGNS`.
        layers: the layers to tap, for designs that read all; None for all.
        max_seq_length: tokens, BOS and EOS counted; None for the model's own limit.
        append_eos, include_prompt, include_bos: see `TextTokenizer`.
        packing: run without padding. "auto" where it is at least as fast (a CPU; a GPU in half precision) and the model
            can; "always" or an error; "never".
        sliding_window: of bidirectional designs, see `mlpool.bidirectional`.

    Raises:
        ValueError: a causal design on an encoder, and what `bidirectional`, `TextTokenizer`, `find_layers` raise.
    """

    config_file_name = CONFIG_NAME
    config_keys: list[str] = [  # noqa: RUF012  (declared so by sentence-transformers)
        "design", "layers", "max_seq_length", "append_eos", "include_prompt", "include_bos", "packing",
        "sliding_window",
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
    ) -> None:
        super().__init__()
        check_choice("packing", packing, _PACKING)
        self.texts = TextTokenizer(tokenizer, append_eos, include_prompt, include_bos)
        self.model = model
        self._design = find_design(design)
        self.design, self.append_eos, self.packing, self.sliding_window = design, append_eos, packing, sliding_window
        self.layers = None if layers is None else list(layers)
        self.max_seq_length = self._limit() if max_seq_length is None else max_seq_length
        self.include_prompt, self.include_bos = include_prompt, include_bos
        self.attn_implementation = backend_of(find_layers(model)[0].config)
        self.base_fingerprint: str | None = None  # of the base model, once there is an adapter on it
        self._arranged_for: tuple[torch.device, torch.dtype] | None = None
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
        self.arrange()
        call: dict[str, Any] = {"input_ids": features["input_ids"]}
        token_mask = features.get("token_mask")
        if "cu_seqlens" in features:
            call |= {"cu_seq_lens_q": features["cu_seqlens"], "cu_seq_lens_k": features["cu_seqlens"]}
        else:
            call["attention_mask"] = features["attention_mask"]
            if token_mask is not None and self.packed:  # the layers see the packed row
                token_mask = token_mask[features["attention_mask"].bool()]
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
        return Taps(self.model, self._design.token_pooling, self.layers)

    # --- attention ----------------------------------------------------------------------------------------------------

    def _set_attention(self) -> None:
        require_transformers()
        trunk, layers = find_layers(self.model)
        config: Any = trunk.config
        encoder = is_encoder(trunk, layers)
        self._takes_cache = hasattr(config, "use_cache") and not encoder
        self.hidden_size: int = config.hidden_size
        self.num_layers = len(layers)
        if self._design.attention == "bidirectional":
            if not encoder:
                bidirectional(self.model, sliding_window=self.sliding_window)
        elif encoder:
            fitting = ", ".join(name for name, design in DESIGNS.items() if design.attention == "bidirectional")
            raise ValueError(
                f"{self.design} needs a causal decoder, and {config.model_type} is an encoder, which reads both "
                f"directions; choose one of {fitting}"
            )
        elif claims_bidirectional(trunk, layers):
            causal(self.model)

    def arrange(self) -> None:
        """Pack or unpack the model as its device and precision suit; by forward, and by trainers before they shard."""
        if self.packing == "never":
            return
        weight = self.model.get_input_embeddings().weight  # type: ignore[operator]
        dtype = _running_dtype(weight)
        if self._arranged_for == (weight.device, dtype):
            return
        # On a GPU in full precision no kernel takes packed texts, and they would run one by one.
        wins = weight.device.type == "cpu" or dtype in (torch.float16, torch.bfloat16)
        if self.packing == "always" or wins:
            self._pack()
        else:
            unpack(self.model)
        self._arranged_for = (weight.device, dtype)

    @property
    def packed(self) -> bool:
        """Whether the model runs packed as it stands."""
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
        config: Any = find_layers(self.model)[0].config
        positions = getattr(config, "max_position_embeddings", None)
        limits = [limit for limit in (self.texts.limit(), positions) if limit and limit > 0]
        return min(limits, default=None)

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """The Hugging Face tokenizer; another one is framed anew."""
        return self.texts.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.texts = TextTokenizer(tokenizer, self.append_eos, self.include_prompt, self.include_bos)

    @property
    def truncated(self) -> Truncated:
        """What has been cut since `reset_truncated`."""
        return self.texts.truncated

    def reset_truncated(self) -> None:
        self.texts.truncated = Truncated()

    # --- save and load ------------------------------------------------------------------------------------------------

    def get_config_dict(self) -> dict[str, Any]:
        values = {key: getattr(self, key) for key in self.config_keys}
        if has_adapter(self.model):
            values["base_fingerprint"] = self.base_fingerprint or fingerprint(self.model)
        return values

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """Write the model (its adapter alone where it has one), the tokenizer and `backbone_config.json`."""
        self.model.save_pretrained(output_path)  # type: ignore[operator]
        self.tokenizer.save_pretrained(output_path)
        self.save_config(output_path)

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> Self:
        """Load what `save` wrote; called by sentence-transformers with its usual arguments."""
        hub: dict[str, Any] = {
            "token": token, "cache_folder": cache_folder, "revision": revision, "local_files_only": local_files_only,
        }  # fmt: skip
        check_folder(model_name_or_path)
        config = cls.load_config(model_name_or_path, subfolder, **hub)
        if "design" not in config:
            raise ValueError(f"{model_name_or_path} lacks {CONFIG_NAME} or its design; it is not a saved embedder")
        expected = config.pop("base_fingerprint", None)
        model, tokenizer = load_model(
            model_name_or_path, {**hub, "trust_remote_code": trust_remote_code}, model_kwargs, subfolder,
            processor_kwargs, config_kwargs, expected,
        )  # fmt: skip
        backbone = cls(model, tokenizer, **config)
        backbone.base_fingerprint = expected
        return backbone


def load_model(
    name: str,
    hub: dict[str, Any],
    model_kwargs: dict[str, Any] | None = None,
    subfolder: str = "",
    tokenizer_kwargs: dict[str, Any] | None = None,
    config_kwargs: dict[str, Any] | None = None,
    expected: str | None = None,
) -> tuple[nn.Module, Any]:
    """A bare model in evaluation mode, in the dtype it was saved in, with its adapter if it has one; its tokenizer.

    Args:
        model_kwargs: of `AutoModel.from_pretrained`; "base" replaces the base model that an adapter names.
        expected: the fingerprint of the base model that an adapter needs.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils.peft_utils import find_adapter_config_file

    hub = {("cache_dir" if key == "cache_folder" else key): value for key, value in hub.items()}
    options: dict[str, Any] = {"dtype": "auto", **(model_kwargs or {})}
    base = options.pop("base", None)
    shared = {key: hub[key] for key in ("token", "cache_dir", "local_files_only")}
    adapter = find_adapter_config_file(name, revision=hub["revision"], subfolder=subfolder, **shared)
    place: dict[str, Any] = {**hub, "subfolder": subfolder}
    source = name
    if adapter is not None:
        source = base or json.loads(Path(adapter).read_text())["base_model_name_or_path"]
        if not Path(source).is_dir() and (Path(source).is_absolute() or str(source).count("/") > 1):
            raise FileNotFoundError(
                f"{name} is an adapter for the base model at {source}, which is not there; pass base= with its folder "
                "or name to mlpool.load"
            )
        place = {**shared, "trust_remote_code": hub["trust_remote_code"]}
    if config_kwargs:
        options["config"] = AutoConfig.from_pretrained(source, **place, **config_kwargs)
    model = AutoModel.from_pretrained(source, **place, **options)
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    if adapter is not None:
        check_base(model, expected, str(source), name)
        load_adapter(model, name, {**shared, "revision": hub["revision"], "subfolder": subfolder})
    tokenizer = AutoTokenizer.from_pretrained(name, **hub, subfolder=subfolder, **(tokenizer_kwargs or {}))
    return model.eval(), tokenizer


def _running_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
