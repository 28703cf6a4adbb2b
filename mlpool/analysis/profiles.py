"""Which layers a trained pool reads: its layer weights, or the attention of its latents and heads over the layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..files import write_csv
from ..pooling import LayerWeightsPool, MultiLayerPool
from ..pooling.layers import read_layer_states
from . import plots

_NUMBERS = 2**24  # of the values that are in memory at once


@dataclass(frozen=True)
class PoolProfile:
    """What a pool reads, averaged over texts. Every distribution over layers sums to 1; reading evenly is 1 / n.

    Attributes:
        pool: its class. texts: how many were averaged over.
        layers: [n], the layers that it reads, from 1 as everywhere here.
        attention: [H, R, n], the attention weights; [1, 1, n] of layer weights, each one's share of their sizes.
        spread: [n], standard deviation over texts of a text's mean weights; None of layer weights, which no text moves.
        effective: [H, n], shares by the length of what arrives: a weight times the length of the layer's value behind
            the head's part of the output projection (Kobayashi et al., arXiv 2004.10102), averaged over texts and
            latents; of layer weights, the weight times the length of the layer's state. None of a folded pool.
        gate: of a residual form: the mean cosine of the embedding with that of plain pooling of the last layer read, 1
            where the pool changes nothing; of the gated one also rms and max of the gate's D entries. Of a softmax mix
            of layers: its scale. Empty otherwise.
    """

    pool: str
    texts: int
    layers: list[int]
    attention: NDArray[np.float64]
    spread: NDArray[np.float64] | None
    effective: NDArray[np.float64] | None
    gate: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> NDArray[np.float64]:
        """[n], over heads and latents."""
        return self.attention.mean((0, 1))

    @property
    def by_head(self) -> NDArray[np.float64]:
        """[H, n]."""
        return self.attention.mean(1)

    @property
    def by_latent(self) -> NDArray[np.float64]:
        """[R, n]."""
        return self.attention.mean(0)

    def __str__(self) -> str:
        count, spread = len(self.layers), self.spread
        most = np.argsort(-self.mean, kind="stable")[:3]
        read = ", ".join(
            f"{self.layers[i]} ({self.mean[i]:.3f}{'' if spread is None else f' ± {spread[i]:.3f}'})" for i in most
        )
        gate = "".join(f"; {name.replace('_', ' ')} {value:.3g}" for name, value in self.gate.items())
        return f"{self.pool} over {count} layers, {1 / count:.3f} each if even; most: {read}{gate}"

    def save(self, directory: str | Path) -> list[Path]:
        """Write pool_profile.csv (measure, axis, index, layer, value, spread) and pool_profile.png."""
        folder = Path(directory)
        paths = [folder / "pool_profile.csv", folder / "pool_profile.png"]
        rows: list[list[Any]] = []
        for measure, axis, values in self._tables():
            known = self.spread is not None and (measure, axis) == ("attention", "overall")
            spread = [f"{x:.6g}" for x in self.spread] if known else [""] * len(self.layers)  # type: ignore[union-attr]
            for index, row in enumerate(values):
                cells = zip(self.layers, row, spread, strict=True)
                rows += [[measure, axis, index, layer, f"{value:.6g}", sd] for layer, value, sd in cells]
        write_csv(paths[0], ["measure", "axis", "index", "layer", "value", "spread"], rows)
        plots.pool_profile(self, paths[1])
        return paths

    def _tables(self) -> list[tuple[str, str, NDArray[np.float64]]]:
        tables = [("attention", "overall", self.mean[None])]
        if self.attention.shape[:2] != (1, 1):
            tables += [("attention", "head", self.by_head), ("attention", "latent", self.by_latent)]
        if self.effective is not None:
            tables.append(("effective", "overall", self.effective.mean(0, keepdims=True)))
            tables += [("effective", "head", self.effective)] if len(self.effective) > 1 else []
        return tables


def pool_profile(embedder: SentenceTransformer, texts: Sequence[str], **options: Any) -> PoolProfile | None:
    """The profile of an embedder's pool, while it encodes `texts`; None where it does not read several layers.

    Args:
        options: of `embedder.encode`: prompt, token_budget, show_progress_bar, …
    """
    if not len(texts):
        raise ValueError("no texts: a profile is an average over some")
    if (reader := reader_of(embedder)) is None:
        return None
    with reader:
        embedder.encode(list(texts), **options)
    return reader.profile()


def reader_of(embedder: Any) -> "_Reader | None":
    """A reader of the embedder's pool, if that reads several layers."""
    pool = next((m for m in embedder.modules() if isinstance(m, MultiLayerPool | LayerWeightsPool)), None)
    return None if pool is None else _Reader(pool)


class _Reader:
    """While entered, sums up what the pool does in every forward. The pool returns what it always does."""

    def __init__(self, pool: Any):
        self.pool = pool
        count = pool.num_layers if pool.layers is None else len(pool.layers)
        self.layers = [i + 1 for i in (range(count) if pool.layers is None else pool.layers)]
        self.attends = isinstance(pool, MultiLayerPool)
        shape = (pool.num_heads, pool.num_latents) if self.attends else (1, 1)
        self._attention = np.zeros((*shape, count))
        self._squares, self._lengths = np.zeros(count), np.zeros((shape[0], count))
        self._texts, self._cosine = 0, 0.0
        self._grams = self._output_grams() if self.attends and not pool.folded else None

    def __enter__(self) -> Self:
        self._handles = [
            self.pool.register_forward_pre_hook(self._ask, with_kwargs=True),
            self.pool.register_forward_hook(self._add, with_kwargs=True),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def profile(self) -> PoolProfile:
        mean = self._attention / self._texts
        spread = np.sqrt(np.maximum(self._squares / self._texts - mean.mean((0, 1)) ** 2, 0)) if self.attends else None
        total = self._lengths.sum(-1, keepdims=True)
        effective = None if self.attends and self._grams is None else self._lengths / np.where(total > 0, total, 1)
        name = type(self.pool).__name__
        return PoolProfile(name, self._texts, self.layers, mean, spread, effective, self._gate())

    def _gate(self) -> dict[str, float]:
        if not self.attends:
            return {} if self.pool.scale is None else {"scale": self.pool.scale.item()}
        if not self.pool.residual:
            return {}
        cosine = {"cosine_with_plain_pooling": self._cosine / self._texts}
        if self.pool.gate is None:
            return cosine
        gate = self.pool.gate.detach().float()
        return {"gate_rms": float(gate.square().mean().sqrt()), "gate_max": float(gate.abs().max()), **cosine}

    def _ask(self, pool: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "output_attentions": True} if self.attends else kwargs

    @torch.inference_mode()
    def _add(self, pool: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        x0 = read_layer_states(pool, None, kwargs["layer_states"]).float()
        if self.attends:
            embedding, attention = output
            weights, x0 = attention.float(), x0.to(attention.device)
            step = max(1, _NUMBERS // (x0.shape[1] * pool.num_heads * pool.head_dim))
            lengths = torch.cat([self._value_lengths(states) for states in x0.split(step)])
            self._squares += _sum(weights.mean((1, 2)).square())
            self._cosine += float(F.cosine_similarity(embedding.float(), x0[:, -1]).sum())
        else:
            embedding, lengths = output, pool._rows(x0).norm(dim=-1)[:, None]
            shares = pool.shares().float().abs().to(x0.device)
            weights = (shares / shares.sum()).expand(len(x0), 1, 1, -1)
        self._lengths += _sum(weights.mean(2) * lengths)
        self._attention += _sum(weights)
        self._texts += len(x0)
        return embedding

    def _value_lengths(self, x0: Tensor) -> Tensor:
        """[B, H, n]: the length of each layer's value behind its head's part of the output projection."""
        pool = self.pool
        if self._grams is None:
            return x0.new_zeros(len(x0), pool.num_heads, x0.shape[1])
        keys = F.layer_norm(
            pool._rows(x0).float() + pool.layer_weights.float(), x0.shape[-1:], pool.key_norm_weight.float(),
            pool.key_norm_bias.float(),
        )  # fmt: skip
        values = (keys @ pool.value_weight.float().T).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        return ((values @ self._grams) * values).sum(-1).clamp_min(0).sqrt()

    @torch.inference_mode()
    def _output_grams(self) -> Tensor:
        """[H, d, d]: with it the length of a projected value takes d² steps, not d · D."""
        heads = self.pool.output_weight.float().unflatten(1, (self.pool.num_heads, -1)).transpose(0, 1)  # [H, D, d]
        return heads.mT @ heads


def _sum(x: Tensor) -> NDArray[np.float64]:
    """Over texts, the first axis."""
    return x.sum(0).cpu().double().numpy()
