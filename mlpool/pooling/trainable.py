"""The trainable cross-attention pooler: parameters, start and forward. Shared by both its kinds."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from mlpool_kernels import Plan, Weights, cross_attend, embed
from mlpool_kernels.plan import default_rates
from mlpool_kernels.rows import mix_rows
from mlpool_kernels.runtime import BACKENDS, use_triton
from torch import Tensor, nn

from . import checkpoints, report
from .base import TOKEN_POOLINGS, check_choice, check_flags, check_positive
from .folding import Folding, require_plain
from .mix import fill_start, start_weights, unit_rows
from .whitening import whitening

# The sizes of the paper's released module.
PAPER = {"num_latents": 768, "num_heads": 32, "head_dim": 2048, "ff_mult": 4, "residual": False}

# Of residual="mix". From the last layer of an embedder that is good already it has less to find, and more to lose.
LEARNING_RATES = {"": 1e-3, "mix_weights": 3e-2}
LEARNING_RATES_FROM_LAST = {"": 3e-4, "mix_weights": 3e-3}
LEARNING_RATES_WHITENED = {"": 1e-3, "mix_weights": 3e-2, "whitening": 1e-4}


class TrainablePool(Folding):
    """Cross-attention of learned latents over n keys per text, feed-forward, mean over latents (arXiv 2409.02727, 3.3).

    Every parameter sits directly on the module and is used inside `forward` alone, so DDP, FSDP2 and ZeRO-3 work.
    See `MultiLayerPool` and `LastLayerPool` for the arguments.
    """

    has_latents = True

    def __init__(
        self, hidden_size: int, num_latents: int, num_heads: int, head_dim: int, ff_mult: int, token_pooling: str,
        residual: bool | str, start: str | Sequence[float], normalize: bool, backend: str,
        choices: Mapping[str, str] | None, num_keys: int | None, whiten: bool, device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_positive(
            hidden_size=hidden_size, num_latents=num_latents, num_heads=num_heads, head_dim=head_dim, ff_mult=ff_mult
        )
        check_choice("token_pooling", token_pooling, TOKEN_POOLINGS)
        check_choice("backend", backend, BACKENDS)
        check_flags(normalize=normalize, whiten=whiten)
        count = num_keys or 1
        _check_residual(residual, start, count, whiten)
        if choices is not None and not isinstance(choices, Mapping):
            raise ValueError(f'choices must be a dict such as {{"keys": "absorbed"}}, got {choices!r}')
        Plan().override(dict(choices or {}))
        self.hidden_size, self.num_latents, self.num_heads = hidden_size, num_latents, num_heads
        self.head_dim, self.ff_mult, self.token_pooling = head_dim, ff_mult, token_pooling
        self.residual, self.normalize, self.backend = residual, normalize, backend
        self.start = start if isinstance(start, str) else start_weights(start, count)
        self.choices, self.folded = dict(choices or {}), False
        if residual == "mix":
            self.learning_rates = LEARNING_RATES_FROM_LAST if start == "last" else LEARNING_RATES
        if whiten:
            self.learning_rates = LEARNING_RATES_WHITENED

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        d, inner, width = hidden_size, num_heads * head_dim, ff_mult * hidden_size
        self.latents = new(num_latents, d)
        self.layer_weights = new(num_keys, d) if num_keys is not None else None
        self.key_norm_weight, self.key_norm_bias = new(d), new(d)
        self.latent_norm_weight, self.latent_norm_bias = new(d), new(d)
        self.query_weight, self.key_weight, self.value_weight = new(inner, d), new(inner, d), new(inner, d)
        self.output_weight = new(d, inner)
        self.ff_norm_weight, self.ff_norm_bias = new(d), new(d)
        self.ff_in_weight, self.ff_in_bias = new(2 * width, d), new(2 * width)
        self.ff_out_weight, self.ff_out_bias = new(d, width), new(d)
        # Vectors, not scalars: FSDP2 cannot shard a tensor without dimensions.
        self.gate = new(d) if residual is True else None
        self.mix_weights = new(count) if residual == "mix" else None
        self.whitening = new(d, d) if whiten else None
        self._cache: tuple[Any, tuple[Any, ...]] | None = None
        self._ask_device()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start: latents from N(0,1), matrices as nn.Linear, norms at identity.

        residual="mix": layer weights and what the output and the feed-forward's second matrix give at 0, the mix at
        `start`. residual=True: layer weights and gate at 0. Either embeds exactly as what it stands on, say EOS or mean
        pooling. Released form: layer weights from N(0,1), as in the paper's module.
        """
        with torch.no_grad():
            self.latents.normal_()
            if self.layer_weights is not None:
                self.layer_weights.zero_() if self.residual else self.layer_weights.normal_()
            for norm in (self.key_norm_weight, self.latent_norm_weight, self.ff_norm_weight):
                norm.fill_(1.0)
            for bias in (self.key_norm_bias, self.latent_norm_bias, self.ff_norm_bias):
                bias.zero_()
            assert self.output_weight is not None
            for matrix in (self.query_weight, self.key_weight, self.value_weight, self.output_weight):
                matrix.uniform_(-(matrix.shape[1] ** -0.5), matrix.shape[1] ** -0.5)
            for matrix, bias in ((self.ff_in_weight, self.ff_in_bias), (self.ff_out_weight, self.ff_out_bias)):
                bound = matrix.shape[1] ** -0.5
                matrix.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
            if self.gate is not None:
                self.gate.zero_()
            if self.mix_weights is not None:
                # The matrices that end the branch, not a gate before it: their first step moves the embedding.
                for last in (self.output_weight, self.ff_out_weight, self.ff_out_bias):
                    last.zero_()
                fill_start(self.mix_weights, self.start)
            if self.whitening is not None:
                nn.init.eye_(self.whitening)

    @property
    def uncalibrated(self) -> bool:
        """Whether this pool whitens and is at its start: the identity, and a branch that gives nothing."""
        matrix = self.whitening
        if matrix is None or not torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)):
            return False
        ends = (self.output_weight, self.ff_out_weight, self.ff_out_bias)
        return not any(end is not None and end.any() for end in ends)

    @torch.no_grad()
    def calibrate(self, embeddings: Tensor) -> None:
        """Set `whitening`, and mix and bias before it, so that embeddings such as these come out whitened.

        What goes into `whitening` is of mean 0 and length √D then, to which the branch is added at its own scale:
        learning rates mean the same whatever the backbone.

        Args:
            embeddings: [N, D] of this pool as it starts, not brought to unit length.

        Raises:
            ValueError: no whitening, a pool not at its start, a wrong shape, embeddings that are all alike.
        """
        if self.whitening is None:
            return super().calibrate(embeddings)
        if not self.uncalibrated:
            raise ValueError("this pool was calibrated or trained before; only the start of a new one is calibrated")
        if embeddings.ndim != 2 or embeddings.shape[1] != self.hidden_size:
            raise ValueError(f"embeddings must be [N, {self.hidden_size}], got {list(embeddings.shape)}")
        matrix, mean, scale = whitening(embeddings.to(self.whitening.device))
        assert self.mix_weights is not None
        self.mix_weights.mul_(scale)
        self.ff_out_bias.copy_(-scale * mean)
        self.whitening.copy_(matrix)

    # --- the pool ------------------------------------------------------------------------------------------------

    def _cross_attend(
        self, states: Sequence[Tensor], rows: Tensor | None, key_mask: Tensor | None, output_attentions: bool,
        mixes: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """W2 ū and ȳ [B, D], of which `_embed` makes the embedding; A [B, H, R, n] where asked; X0 where gathered.

        mixes: the keys are the rows that residual="mix" mixes, at one length, and ȳ stands on their mix.
        """
        batch, keys = (rows.shape[0], len(states)) if rows is not None else states[0].shape[:2]
        training = torch.is_grad_enabled() and any(t.requires_grad for t in chain(states, self.parameters()))
        if self.folded and training:
            raise RuntimeError("a folded pool is for inference; use the pool it was folded from to train")
        plan = self._choose(batch, keys, training=training, cached=self._may_cache() or self.folded)
        queries, key, value, output, ff_in, ff_out = self._matrices(plan, one_key=keys == 1)
        weights = Weights(
            self.layer_weights, self.key_norm_weight, self.key_norm_bias, queries, key, value, output, self.latents,
            self.ff_norm_weight, self.ff_norm_bias, ff_in, self.ff_in_bias,
            self.mix_weights if mixes else None,
        )  # fmt: skip
        if keys == 1 and training and not self.folded:
            states = [_ZeroGradients.apply(states[0], *self._query_parameters())]
        product, y_mean, attention, x0 = cross_attend(
            states, rows, key_mask, weights, ff_out, self.num_heads, plan, self.backend, output_attentions,
        )  # fmt: skip
        if attention is not None:
            attention = attention.unflatten(2, (self.num_heads, self.num_latents)).permute(0, 2, 3, 1)
        return product, y_mean, attention, x0

    def _rows(self, x0: Tensor) -> Tensor:
        """What the pool reads of X0 [B, n, D]: with residual="mix" every row at the same length."""
        return x0 if self.mix_weights is None else unit_rows(x0)

    def _embed(
        self, product: Tensor, y_mean: Tensor, rows: Tensor | None, dtype: torch.dtype, mixed: bool
    ) -> Tensor:  # fmt: skip
        """What the pooler is added to, and unit length.

        Args:
            rows: X0 [B, n, D], read by residual=True, and by "mix" unless it is `mixed` already, in ȳ; at one length
                then. dtype: of the hidden states.
        """
        base, bias = None, cast(Tensor, self.ff_out_bias)
        if self.gate is not None:
            assert rows is not None
            base = rows[:, -1]
        elif self.mix_weights is not None and not mixed:
            assert rows is not None
            base = mix_rows(self.mix_weights, rows)
            # Less what the latents alone would give, all texts the same; rounded as in the pool.
            bias = bias.to(y_mean.dtype) - self.latents.to(self._compute_dtype()).mean(0, dtype=y_mean.dtype)
        dtype = torch.promote_types(dtype, self._compute_dtype())
        if self.whitening is None:
            return embed(product, bias, y_mean, base, self.gate, self.normalize, dtype, self.backend)
        plain = embed(product, bias, y_mean, base, self.gate, False, dtype, self.backend)
        return self._finish(F.linear(plain, self.whitening.to(dtype)))

    def plan(self, batch_size: int = 32, tokens: int | None = None, training: bool = False) -> report.PlanReport:
        """What runs for a batch of this size: the forms chosen, FLOP and bytes of each step beside the reference's.

        Args:
            batch_size: B. tokens: T, where the tokens are the keys or are averaged. training: with a backward pass.

        Returns: an object that prints as a table; `.plan`, `.rows` hold what it shows.
        """
        check_positive(batch_size=batch_size)
        keys = self._plan_keys(tokens)
        plan = self._choose(batch_size, keys, training=training, cached=not training)
        dtype, device = self._compute_dtype(), self.latents.device
        return report.PlanReport.of(
            type(self).__name__, self._sizes(batch_size, keys), plan,
            self._rates.get(dtype) or default_rates(device.type, dtype.itemsize), device, dtype,
            triton=use_triton(self.backend, self.latents), masked=self._masked(keys),
            tokens=tokens, training=training,
        )  # fmt: skip

    # --- the authors' checkpoints --------------------------------------------------------------------------------

    def released_state_dict(self) -> dict[str, Tensor]:
        """The parameters under the names of the authors' `attn_pool.pt`.

        Raises: ValueError for the residual form or a folded pool, which the released module cannot hold.
        """
        if self.residual or self.folded:
            raise ValueError(
                "the released module has no residual gate and no folded weights; build the pool with residual=False "
                "(MultiLayerPool.paper) to export it"
            )
        return checkpoints.to_released(dict(self.state_dict()))

    def save_pretrained(self, directory: Any) -> None:
        """As `Pool.save_pretrained`; a folded pool is an error, save the one it was folded from."""
        if self.folded:
            raise ValueError("a folded pool is not saved: save the pool it was folded from and fold it after loading")
        require_plain(self)
        super().save_pretrained(directory)


class _ZeroGradients(torch.autograd.Function):
    """The identity, with zero gradients for parameters that the result does not depend on (DDP wants them all)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def _check_residual(residual: bool | str, start: str | Sequence[float], count: int, whiten: bool) -> None:
    if residual not in (True, False, "mix") or isinstance(residual, int) != isinstance(residual, bool):
        raise ValueError(f'residual must be "mix", True or False, got {residual!r}')
    start_weights(start, count)
    if residual != "mix" and start != "last":
        raise ValueError(f'start={start!r} is for residual="mix"; residual={residual!r} has no mix to start from')
    if residual != "mix" and whiten:
        raise ValueError(f'whiten=True is for residual="mix"; residual={residual!r} has no mix to whiten')
