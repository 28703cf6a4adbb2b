"""One measured case: a pool, the eager reference over the same parameters, one batch, and what is right for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from cases import EVAL, STEP, TRAIN, Case, Preset, choices_of
from measure import relative_error
from mlpool_kernels import reference
from torch import Tensor, nn

import mlpool

# Texts that the errors are computed on, with float64 up to this many FLOP.
PARITY_TEXTS, FLOAT64_FLOPS = 2, 3e10
# Bounds for float32 against the reference; in low precision multiples of eager's own error.
FLOAT32_FORWARD, FLOAT32_GRADIENT = 1e-5, 1e-4
LOW_FORWARD, LOW_GRADIENT = 2, 3

Forward = Callable[[], Tensor]


class Parity(NamedTuple):
    """Relative errors and their bounds; gradient: of the parameter or state closest to, or furthest over, its bound."""

    error: float
    limit: float
    gradient: float | None = None
    gradient_limit: float | None = None
    gradient_of: str = ""

    @property
    def green(self) -> bool:
        # A NaN is red too.
        fine = self.error <= self.limit
        return fine and (self.gradient is None or self.gradient_limit is None or self.gradient <= self.gradient_limit)


def build_pool(preset: Preset, device: torch.device | str, dtype: torch.dtype) -> nn.Module | None:
    options: dict[str, Any] = {"token_pooling": preset.token_pooling, "device": device, "dtype": dtype}
    if preset.kind == "gather":
        return None
    if preset.kind == "last":
        return randomised(mlpool.LastLayerPool.paper(preset.hidden, **options))
    make = mlpool.MultiLayerPool.paper if preset.paper else mlpool.MultiLayerPool
    return randomised(make(preset.hidden, preset.layers, **options))


def randomised(pool: nn.Module) -> nn.Module:
    """Gate, norms, biases and what is zero away from their start, which would hide errors: behind a zero the whole
    pooler, and in low precision a gradient that ought to be none is noise."""
    with torch.no_grad():
        for name, p in pool.named_parameters():
            if name in ("output_weight", "ff_out_weight") and getattr(pool, "residual", None) == "mix":
                p.normal_(std=p.shape[1] ** -0.5)
            elif name == "gate" or name == "layer_weights" or "norm" in name or name.endswith("bias"):
                p.add_(torch.randn_like(p), alpha=1.0 if name == "gate" else 0.2)
    return pool


@contextmanager
def through_dispatcher() -> Iterator[None]:
    """Calls of the pool go through torch.ops, as they do where something traces."""
    module = importlib.import_module("mlpool_kernels.pool")
    original = module._forward

    def dispatched(states, rows, key_mask, w, heads, plan, backend, output_attentions):
        module._forward = original
        try:
            return module._pool_op(list(states), rows, key_mask, *w, heads, str(plan), backend, output_attentions)
        finally:
            module._forward = dispatched

    module._forward = dispatched
    try:
        yield
    finally:
        module._forward = original


class Work:
    """The batch of a case and every provider's way through it."""

    def __init__(self, case: Case, preset: Preset, batch: int, pool: nn.Module | None, device: torch.device,
                 dtype: torch.dtype) -> None:  # fmt: skip
        self.case, self.preset, self.batch, self.pool, self.dtype = case, preset, batch, pool, dtype
        self.training = case.mode in (TRAIN, STEP)
        self.parameters = {} if pool is None else dict(pool.named_parameters())
        torch.manual_seed(0)
        shape = (batch, case.tokens or preset.layers, preset.hidden)
        count = preset.layers if case.tokens else 1
        self.states = [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]
        for state in self.states:
            state.requires_grad_(self.training)
        self.mask = torch.ones(batch, case.tokens or 1, dtype=torch.int64, device=device)
        if case.padded and case.tokens:
            lengths = torch.randint(case.tokens // 2, case.tokens + 1, (batch, 1), device=device)
            self.mask = (torch.arange(case.tokens, device=device) < lengths).long()
        self.cotangent = torch.randn(batch, preset.hidden, device=device, dtype=dtype)
        self.texts = sorted({0, batch - 1})[:PARITY_TEXTS]
        # As the wrappers do: in training mode nothing is cached, in evaluation the folded weights are.
        if pool is not None:
            pool.train(self.training)
            for parameter in pool.parameters():
                parameter.grad = None
        # Folded weights by provider.
        self.folded: dict[str, Any] = {}
        self.optimizer = None
        if case.mode == STEP and pool is not None:
            self.optimizer = torch.optim.AdamW(pool.parameters(), lr=1e-6, fused=True)

    # --- providers ---------------------------------------------------------------------------------------------------

    def forward(self, provider: str) -> Forward:
        """The embedding of the batch, as `provider` computes it."""
        kind, _, form = provider.partition(" ")
        if kind == "compiled":
            torch._dynamo.reset()
            compiled = torch.compile(self.reference, dynamic=False)
            return lambda: compiled(self.parameters, self.states, self.mask)
        if kind == "eager":
            return lambda: self.reference(self.parameters, self.states, self.mask)

        def fast() -> Tensor:
            if form == "dispatcher":
                with through_dispatcher():
                    return self.fast()
            return self.fast()

        def choosing() -> Tensor:
            # Each choice keeps its own folded weights, as it would alone.
            self.pool.choices, self.pool._cache = choices_of(provider), self.folded.get(provider)
            out = fast()
            self.folded[provider] = self.pool._cache
            return out

        return fast if self.pool is None else choosing

    def reference(self, parameters: Mapping[str, Tensor], states: Sequence[Tensor], mask: Tensor) -> Tensor:
        pooling = self.preset.token_pooling
        if self.case.tokens is None:
            # Gathered states [B, L, D] are hidden states of one token.
            states = states[0].unsqueeze(2).unbind(1)
        if self.preset.kind == "gather":
            return reference.gather(states, mask, pooling)
        heads = self.pool.num_heads
        if self.preset.kind == "last":
            return reference.last_layer_pool(states[0], mask, parameters, heads, pooling)
        return reference.multi_layer_pool(states, mask, parameters, heads, pooling)

    def fast(self) -> Tensor:
        if self.preset.kind == "gather":
            return mlpool.gather(self.states, self.mask, token_pooling=self.preset.token_pooling)
        if self.preset.kind == "last":
            return self.pool(self.states[0], self.mask)
        if self.case.tokens is None:
            return self.pool(layer_states=self.states[0])
        return self.pool(self.states, self.mask, includes_embedding=False)

    def call(self, forward: Forward) -> Callable[[], None]:
        """What is timed."""

        def run() -> None:
            if self.case.mode == EVAL:
                with torch.no_grad():
                    forward()
                return
            forward().backward(self.cotangent)
            if self.optimizer is not None:
                self.optimizer.step()

        return run

    def prepare(self) -> None:
        """No gradients, as after `zero_grad()`."""
        for t in (*self.parameters.values(), *self.states):
            t.grad = None

    def prepare_memory(self, provider: str) -> None:
        """Optimizer state is there and is not extra; folded weights are not there, and are."""
        self.folded.pop(provider, None)
        if self.pool is not None:
            self.pool.train(self.training)
        if self.optimizer is not None and not self.optimizer.state:
            for p in self.parameters.values():
                p.grad = torch.zeros_like(p)
            self.optimizer.step()
        self.prepare()

    @property
    def gradient_bytes(self) -> int:
        """Of the weight gradients that a call makes: they belong to the weights, not to the extra memory."""
        return sum(p.numel() * p.element_size() for p in self.parameters.values()) if self.training else 0

    # --- cost --------------------------------------------------------------------------------------------------------

    def cost(self, provider: str) -> tuple[float, float, str, float | None]:
        """(FLOP, FLOP of the floor, plan, milliseconds predicted) of one call; for "gather" bytes of states instead.

        The backward counts twice the forward; the floor is our plan without computing anything again.
        """
        if self.pool is None:
            size = float(sum(s.numel() * s.element_size() for s in self.states))
            return size, size, "", None
        kind, _, _ = provider.partition(" ")
        self.pool.choices = choices_of(provider)
        report = self.pool.plan(self.batch, self.case.tokens, training=self.training)
        ours = sum(row[2] for row in report.rows)
        passes = 3 if self.training else 1
        floor = passes * (self.batch * ours + (report.once if self.training else 0))
        if kind != "mlpool":
            return passes * self.batch * sum(row[3] for row in report.rows), floor, "", None
        again = {"recompute_ff": report.rows[2][2], "recompute": ours}.get(report.plan.memory, 0)
        flops = floor + (self.batch * again if self.training else 0)
        return flops, floor, str(report.plan), sum(report.seconds) * 1e3

    # --- parity ------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Compute what is right, and eager's own error in low precision, on a few texts."""
        low = self.dtype in (torch.bfloat16, torch.float16)
        flops = self.cost("eager")[0] / self.batch * len(self.texts) if self.pool is not None else 0
        self.wide = torch.float32 if low or flops > FLOAT64_FLOPS else torch.float64
        self.truth, self.true_gradients = self._few_texts(self.wide)
        self.low = None
        if low:
            out, gradients = self._few_texts(self.dtype)
            self.low = relative_error(out, self.truth), self._gradient_errors(gradients)

    def parity(self, provider: str, forward: Forward) -> Parity:
        """Errors of the whole call on the texts chosen: the other texts get no gradient, so reach no weight's."""
        if provider == "eager" and self.low is not None:
            return self._judge(*self.low)
        with torch.set_grad_enabled(self.training):
            out = forward()
        error = relative_error(out.detach()[self.texts], self.truth)
        if not self.training:
            return self._judge(error, {})
        cotangent = torch.zeros_like(out)
        cotangent[self.texts] = self.cotangent[self.texts].to(out.dtype)
        leaves = [*self.parameters.values(), *self.states]
        gradients = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
        filled = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)]
        own, states = filled[: len(self.parameters)], filled[len(self.parameters) :]
        named = dict(zip(self.parameters, own, strict=True))
        named["states"] = torch.stack([g[self.texts] for g in states])
        return self._judge(error, self._gradient_errors(named))

    def _few_texts(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """The reference in `dtype` on the few texts: embedding and gradients."""

        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(self.training)

        parameters = {name: leaf(p) for name, p in self.parameters.items()}
        states = [leaf(s.detach()[self.texts]) for s in self.states]
        with torch.set_grad_enabled(self.training):
            out = self.reference(parameters, states, self.mask[self.texts])
        if not self.training:
            return out, {}
        leaves = [*parameters.values(), *states]
        gradients = torch.autograd.grad(out, leaves, self.cotangent[self.texts].to(out.dtype), allow_unused=True)
        filled = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)]
        named = dict(zip(parameters, filled, strict=False))
        return out.detach(), {**named, "states": torch.stack(filled[len(parameters) :])}

    def _gradient_errors(self, gradients: Mapping[str, Tensor]) -> dict[str, float]:
        # A gradient that is zero but for rounding is compared with the largest one.
        least = 1e-6 * max((float(g.norm()) for g in self.true_gradients.values()), default=0.0)
        return {name: relative_error(g, self.true_gradients[name], least) for name, g in gradients.items()}

    def _judge(self, error: float, gradients: Mapping[str, float]) -> Parity:
        # Where eager is right by luck, rounding the result alone still costs a quarter of the dtype's step.
        rounding = torch.finfo(self.dtype).eps / 4
        forward_limit, limits = FLOAT32_FORWARD, dict.fromkeys(gradients, FLOAT32_GRADIENT)
        if self.low is not None:
            forward_limit = max(LOW_FORWARD * self.low[0], rounding)
            limits = {name: max(LOW_GRADIENT * self.low[1][name], rounding) for name in gradients}
        if not gradients:
            return Parity(error, forward_limit)
        worst = max(gradients, key=lambda name: _badness(gradients[name], limits[name]))
        return Parity(error, forward_limit, gradients[worst], limits[worst], worst)


def _badness(error: float, limit: float) -> float:
    return error / limit if error == error else float("inf")


def needed_bytes(case: Case, preset: Preset, batch: int, weights: int, itemsize: int) -> int:
    """An estimate of what the eager reference and the check against it take; weights: how many, not counted again."""
    training = case.mode != EVAL
    states = 2 * batch * preset.layers * (case.tokens or 1) * preset.hidden
    numbers = states * (2 if preset.token_pooling == "mean" and case.tokens else 1) * (2 if training else 1)
    if preset.kind != "gather":
        latents, heads, inner, mult = (768, 32, 65536, 4) if preset.paper else (64, 8, 512, 1)
        width = mult * preset.hidden
        keys = preset.layers if preset.kind == "multi" else case.tokens or 1
        # Queries, their repeated norm, heads' outputs and a copy of them in another order; twice more to go back.
        numbers += batch * latents * ((3.5 if training else 3) * inner + (8 if training else 5) * width)
        numbers += batch * (4 if training else 2) * keys * (heads * latents + inner)
    copies = {EVAL: 0, TRAIN: 2, STEP: 4}[case.mode]
    check = 4 // itemsize * (2 if training else 1) if itemsize < 4 else int(training)
    return int(itemsize * (numbers + (copies + check) * weights))
