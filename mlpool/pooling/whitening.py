"""Whitening: the matrix that takes from embeddings what is alike in all texts, and weighs the rest evenly.

    e = W s (v - μ)     W = r (C + λ tr(C)/D I)^{-1/2} / s        C, μ: covariance and mean of some texts' v

Embeddings of a language model lie in a narrow cone: a few directions hold most of their variance, and every cosine is
high. W (v - μ) has none of either. λ keeps directions that hardly vary from being all noise. s brings v - μ to the
length √D, r brings e there (root mean square over the texts).

Source: BERT-whitening (arXiv 2103.15316); λ and the lengths are mlpool's own.
"""

import torch
from torch import Tensor

SHRINKAGE = 0.3  # λ


def whitening(embeddings: Tensor) -> tuple[Tensor, Tensor, float]:
    """W [D, D], symmetric, and μ [D], both float64, and s, of embeddings v [N, D].

    Raises:
        ValueError: fewer than two texts, or embeddings that are all alike.
    """
    if len(embeddings) < 2:
        raise ValueError(f"whitening needs the embeddings of at least 2 texts, got {len(embeddings)}")
    wide = embeddings.double()
    mean = wide.mean(0)
    centred = wide - mean
    covariance = centred.T @ centred / len(wide)
    level = covariance.trace() / len(mean)
    if not level > 0:
        raise ValueError(f"the embeddings of {len(wide)} texts are all alike; whitening needs texts that differ")
    values, vectors = torch.linalg.eigh(covariance)
    matrix = vectors * (values.clamp(min=0) + SHRINKAGE * level).rsqrt() @ vectors.T
    length = (centred @ matrix).square().sum(1).mean().sqrt()
    scale = float(level.rsqrt())
    return matrix * (len(mean) ** 0.5 / length / scale), mean, scale
