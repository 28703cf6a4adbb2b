"""The forms that a batch of a trainable pool runs in, and its weights folded to them: kept where nothing learns."""

from functools import lru_cache
from typing import Any, Self

import torch
from mlpool_kernels import Plan, Sizes, choose, fold_queries, fold_values
from mlpool_kernels.runtime import device_memory, use_triton
from mlpool_kernels.tiles import fitted_rates
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .base import Pool, running_dtype

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimisers change weights without raising their version; torch's own hook tells of every step.
register_optimizer_step_post_hook(_count_step)
_chosen = lru_cache(maxsize=1024)(choose)


class Folding(Pool):
    """What `TrainablePool` folds of its parameters, once for every change of them."""

    hidden_size: int
    num_latents: int
    num_heads: int
    head_dim: int
    ff_mult: int
    backend: str
    choices: dict[str, str]
    folded: bool
    folded_queries: Tensor
    latents: nn.Parameter
    layer_weights: nn.Parameter | None
    latent_norm_weight: nn.Parameter
    latent_norm_bias: nn.Parameter
    query_weight: nn.Parameter
    key_weight: nn.Parameter
    value_weight: nn.Parameter
    output_weight: nn.Parameter | None
    ff_in_weight: nn.Parameter
    ff_out_weight: nn.Parameter
    _cache: tuple[Any, tuple[Any, ...]] | None

    def _compute_dtype(self) -> torch.dtype:
        return running_dtype(self.ff_in_weight)

    def _sizes(self, batch: int, keys: int) -> Sizes:
        return Sizes(
            batch, keys, self.hidden_size, self.num_latents, self.num_heads, self.head_dim,
            self.ff_mult * self.hidden_size,
        )  # fmt: skip

    def _masked(self, keys: int) -> bool:
        """Whether the keys are tokens, which come with a padding mask."""
        return self.layer_weights is None and keys != 1

    def _choose(self, batch: int, keys: int, *, training: bool, cached: bool) -> Plan:
        # Choosing takes longer than a small pool's launches; torch.compile does it once and traces no cache.
        pick = choose if torch.compiler.is_compiling() else _chosen
        plan = pick(
            self._sizes(batch, keys), training=training, cached=cached, triton=use_triton(self.backend, self.latents),
            itemsize=self._compute_dtype().itemsize, memory_bytes=self._device_memory,
            masked=self._masked(keys), rates=self._rates.get(self._compute_dtype()),
        )  # fmt: skip
        if not self.folded:
            return plan.override(self.choices)
        values = "early" if self.output_weight is not None else "absorbed"
        return plan.override({**self.choices, "keys": "absorbed", "values": values})

    def _fold(self, plan: Plan, one_key: bool) -> tuple[Any, ...]:
        """Queries, key weight, value weight and output weight in the compute dtype, in the forms that `plan` names."""
        dtype = self._compute_dtype()
        value: Tensor = self.value_weight.to(dtype)
        output = None if self.output_weight is None else self.output_weight.to(dtype)
        if self.folded:
            return (None if one_key else self.folded_queries.to(dtype)), None, value, output
        if plan.values == "absorbed":
            assert output is not None
            value, output = fold_values(value, output, self.num_heads), None
        if one_key:
            return None, None, value, output
        key = self.key_weight.to(dtype)
        latents = (self.latents, self.latent_norm_weight, self.latent_norm_bias, self.query_weight.to(dtype))
        queries = fold_queries(*latents, key if plan.keys == "absorbed" else None, self.num_heads)
        return queries, (key if plan.keys == "plain" else None), value, output

    def _may_cache(self) -> bool:
        """Only where nothing can be learning: not in training mode, nor under gradients, nor in a traced graph."""
        return not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.folded)

    def _matrices(self, plan: Plan, one_key: bool) -> tuple[Any, ...]:
        """What `_fold` gives, W1 and W2, all in the compute dtype; kept where nothing learns."""

        def fold() -> tuple[Any, ...]:
            dtype = self._compute_dtype()
            return *self._fold(plan, one_key), self.ff_in_weight.to(dtype), self.ff_out_weight.to(dtype)

        if not self._may_cache():
            self._cache = None
            return fold()
        used = [*self._query_parameters(), self.latents, self.value_weight, self.output_weight]
        used += [self.ff_in_weight, self.ff_out_weight]
        key = (
            plan.keys, plan.values, one_key, self._compute_dtype(), _optimizer_steps,
            tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in used if p is not None),
        )  # fmt: skip
        if self._cache is None or self._cache[0] != key:
            # Outside inference mode: a cache of inference tensors could not be used in a later no_grad forward.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = key, fold()
        return self._cache[1]

    def train(self, mode: bool = True) -> Self:
        self._cache = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._cache = None
        super()._apply(*args, **kwargs)
        self._ask_device()
        return self

    def _ask_device(self) -> None:
        """What the cost model asks of the device, once: torch.compile cannot trace the questions."""
        self._device_memory = device_memory(self.latents.device)
        self._rates = fitted_rates(self.latents.device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def fold(self) -> Self:
        """An inference-only copy: queries and keys folded into one matrix, values too where that is cheaper.

        Folds Wq [I,D] and Wk [I,D] into Q̃ [H·R,D] (at the released sizes and D=4096: 537 M numbers into 101 M).
        The copy shares nothing with this pool, has no trainable parameters, and gives the same embeddings.
        """
        if self.folded:
            raise ValueError("this pool is folded already")
        require_plain(self)
        folded = type(self)(**self.config(), device="meta")
        plan = self._choose(1, self._plan_keys(None), training=False, cached=True)
        with torch.inference_mode(False), torch.no_grad():
            queries, _, value, output = self._fold(plan.override({"keys": "absorbed"}), one_key=False)
            for name, parameter in self.named_parameters():
                setattr(folded, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            folded.value_weight = nn.Parameter(value.detach().clone(), requires_grad=False)
            folded.output_weight = None if output is None else nn.Parameter(output.clone(), requires_grad=False)
        folded.query_weight = folded.key_weight = None  # type: ignore[assignment]
        folded.register_buffer("folded_queries", queries, persistent=True)
        folded.folded = True
        return folded.eval()

    def _query_parameters(self) -> list[Tensor]:
        return [self.query_weight, self.key_weight, self.latent_norm_weight, self.latent_norm_bias]

    def _plan_keys(self, tokens: int | None) -> int:
        raise NotImplementedError


def require_plain(pool: nn.Module) -> None:
    sharded = [name for name, p in pool.named_parameters() if hasattr(p, "full_tensor")]
    if sharded:
        raise RuntimeError(
            f"{type(pool).__name__} is sharded ({sharded[0]}, …); gather it first, for example with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(full_state_dict=True)"
        )
