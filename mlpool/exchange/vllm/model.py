"""The model that vLLM runs: its own layers of the family, a row per text taken as each ends, and mlpool's pool on them.

vLLM's models end each layer with `_maybe_add_hidden_state(collected, number, output, residual)`, which collects whole
hidden states [tokens, D] for speculative decoding. Here it keeps one row per text in a buffer [texts, L, D]. The
operation that does so finds the texts in the forward's context, as vLLM's attention does, and stands outside of
recorded graphs for the same reason (see `config.py`). In a pipeline the buffer travels with the hidden states.
"""

import importlib
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.pooler.activations import PoolerNormalize
from vllm.model_executor.layers.pooler.seqwise import EmbeddingPoolerHead
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.tasks import PoolingTask
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.pool.metadata import PoolingMetadata

from ...files import confined, read_json
from ...pooling.base import CONFIG_NAME, Pool, gather_tokens
from ...pooling.registry import find_pool
from ...pooling.tokens import Tokens, select_tokens
from ...trunk import mixed
from . import FAMILIES, check_version
from .config import settings_of

_OPERATION = ("mlpool", "keep_rows")
_ROWS = "mlpool_rows"  # among what a stage of a pipeline hands on
_CONTEXT = "mlpool"  # in a forward's context: the texts, and how they are pooled
_library = torch.library.Library(_OPERATION[0], "FRAGMENT")


def _keep_rows(hidden: Tensor, residual: Tensor, rows: Tensor, slot: int) -> None:
    """Put the rows of hidden + residual [tokens, D] into rows [texts, slots, D]."""
    found = get_forward_context().additional_kwargs.get(_CONTEXT)
    if found is not None:  # else a forward without texts, to measure memory
        _pool_into(rows, slot, hidden + residual, *found)


def _keep_rows_fake(hidden: Tensor, residual: Tensor, rows: Tensor, slot: int) -> None:
    return None


def _pool_into(rows: Tensor, slot: int, state: Tensor, tokens: Tokens, token_pooling: str) -> None:
    rows[: tokens.batch_size, slot] = gather_tokens([state], tokens, token_pooling, "auto")[:, 0]


direct_register_custom_op(
    _OPERATION[1], _keep_rows, mutates_args=["rows"], fake_impl=_keep_rows_fake, target_lib=_library
)


def _keep_out_of_graphs(compilation: Any) -> None:
    """The operation reads which texts are in the batch, and a recorded CUDA graph would replay those of another."""
    if compilation.cudagraph_mode.has_full_cudagraphs():
        raise ValueError(
            f"cudagraph_mode {compilation.cudagraph_mode.name} records whole forwards; take PIECEWISE or NONE"
        )
    operation = "::".join(_OPERATION)
    if compilation.splitting_ops and operation not in compilation.splitting_ops:
        compilation.splitting_ops.append(operation)


class _Tapped:
    """Mixed in before a family's model.

    Attributes: rows: [texts, slots, D]. slots: the number of a layer's output (the first layer's is 1) → its slot.
    """

    rows: Tensor
    slots: dict[int, int]

    def _maybe_add_hidden_state(self, collected: list[Tensor], number: int, hidden: Tensor, residual: Any) -> Any:
        slot = self.slots.get(number)
        if slot is not None:
            torch.ops.mlpool.keep_rows(hidden, residual, self.rows, slot)
        return collected


class EmbeddingModel(nn.Module, SupportsPP, VllmModelForPooling):
    """What `architectures` of an exported folder names.

    Raises:
        ImportError, ValueError: see `check_version` and `settings_of`.
    """

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        check_version()
        config = vllm_config.model_config.hf_config
        settings = settings_of(config)
        self.token_pooling, self.skip_tokens = settings["token_pooling"], settings["skip_tokens"]
        _keep_out_of_graphs(vllm_config.compilation_config)
        module, name = FAMILIES[config.model_type]
        family = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
        self.model = mixed(_Tapped, family)(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        layers = settings["layers"]  # those that are read one by one; [] of a pool of the last
        normed = bool(layers) and settings["final_norm"] and layers[-1] == config.num_hidden_layers - 1
        self.normed_slot = len(layers) - 1 if normed else None
        self.model.slots = {layer + 1: slot for slot, layer in enumerate(layers) if slot != self.normed_slot}
        texts = vllm_config.scheduler_config.max_num_seqs
        self.model.register_buffer("rows", torch.zeros(texts, len(layers), config.hidden_size), persistent=False)
        pool = _load_pool(vllm_config, settings["pool"])
        self.pooler = DesignPooler(pool, self.model, self.skip_tokens, vllm_config.model_config.head_dtype)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """The last hidden state [tokens, D]; of a stage that is not the last, what the next one takes."""
        rows = self.model.rows
        found = self._find_texts() if rows.shape[1] else None
        if intermediate_tensors is not None and rows.shape[1]:
            others = dict(intermediate_tensors.tensors)
            above = others.pop(_ROWS)
            rows[: above.shape[0]] = above
            intermediate_tensors = IntermediateTensors(others)
        output = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        if isinstance(output, IntermediateTensors):
            if rows.shape[1]:
                # Cut to the tokens, as the next stage will cut it; a copy, since it is sent beside the next batch.
                output.tensors[_ROWS] = rows[: output["hidden_states"].shape[0]].clone()
        elif self.normed_slot is not None and found is not None:
            _pool_into(rows, self.normed_slot, output, *found)
        return output

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What a stage takes, before there is any."""
        empty = self.model.make_empty_intermediate_tensors(batch_size, dtype, device)
        if self.model.rows.shape[1]:
            empty.tensors[_ROWS] = torch.zeros_like(self.model.rows)
        return empty

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Of an exported folder: named as those of a bare model."""
        loaded = {f"model.{name}" for name in self.model.load_weights(weights)}
        return loaded | {f"pooler.{name}" for name, _ in self.pooler.named_parameters()}

    def _find_texts(self) -> tuple[Tokens, str] | None:
        """The texts of this forward, also put where the layers find them; None where there are none."""
        context = get_forward_context() if is_forward_context_available() else None
        if context is None or not context.attn_metadata:
            return None
        if isinstance(context.attn_metadata, list):
            raise RuntimeError("a batch in parts (--enable-dbo) has no one list of texts; leave the option out")
        attention = next(iter(context.attn_metadata.values()))
        offsets = getattr(attention, "query_start_loc", None)
        if offsets is None:
            raise RuntimeError(
                f"{type(attention).__name__} does not say where texts begin (query_start_loc); serve with another "
                "attention: --attention-backend FLASH_ATTN or TRITON_ATTN"
            )
        total = attention.num_actual_tokens
        mask = _skip(offsets, total, self.skip_tokens)
        tokens = select_tokens((total, self.model.rows.shape[-1]), offsets.device, None, offsets, mask)
        context.additional_kwargs[_CONTEXT] = tokens, self.token_pooling
        return tokens, self.token_pooling


class DesignPooler(Pooler):
    """A pool of mlpool, on the kept rows or on the last hidden state, as vLLM calls it: one embedding a text.

    Args:
        model: whose `rows` are read. skip_tokens: first tokens of each text to leave out, though one always is pooled.
    """

    def __init__(self, pool: Pool, model: nn.Module, skip_tokens: int, head_dtype: torch.dtype) -> None:
        super().__init__()
        self.pool, self.skip_tokens = pool, skip_tokens
        self._tapped: tuple[Any] = (model,)  # in a tuple: it is no part of the pooler
        normalize = PoolerNormalize() if pool.normalize else None
        self.head = EmbeddingPoolerHead(head_dtype=head_dtype, activation=normalize)  # cuts to `dimensions`, too

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {"embed"}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> Any:
        """hidden_states [tokens, D], final-normed → embeddings [B, D]."""
        cursor = pooling_metadata.get_pooling_cursor()
        first, last = cursor.first_token_indices_gpu, cursor.last_token_indices_gpu
        if self.pool.reads_all_layers:
            embeddings = self.pool(layer_states=self._tapped[0].rows[: len(first)])
        else:
            offsets = torch.cat([first, last[-1:] + 1])
            mask = _skip(offsets, hidden_states.shape[0], self.skip_tokens)
            embeddings = self.pool(hidden_states, cu_seqlens=offsets, token_mask=mask)
        return self.head(embeddings, pooling_metadata)


def _skip(offsets: Tensor, total: int, count: int) -> Tensor | None:
    """Token mask [total] without each text's first `count` tokens, but with its last; None where count is 0."""
    if not count:
        return None
    lengths = offsets.diff()
    spread = torch.stack([offsets[:-1], (lengths - 1).clamp(max=count)])
    start, skipped = spread.repeat_interleave(lengths, dim=1, output_size=total)
    return torch.arange(total, device=offsets.device) - start >= skipped


def _load_pool(vllm_config: VllmConfig, place: str) -> Pool:
    """The pool of a folder or Hub name, in the precision that it was saved in."""
    model = vllm_config.model_config
    folder = model.model
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        cache = vllm_config.load_config.download_dir
        folder = snapshot_download(folder, revision=model.revision, cache_dir=cache, allow_patterns=[f"{place}/*"])
    directory = confined(folder, place, "config.json")
    config = read_json(directory / CONFIG_NAME)
    pool = find_pool(config.get("pool"), config.get("package")).from_pretrained(directory)
    pool.skip_tokens = 0  # type: ignore[assignment]  # left out of the rows, or by the mask
    return pool.eval().requires_grad_(False)
