"""Calibrating an embedder: the start of a pool that whitens, from texts without labels."""

from collections.abc import Sequence
from typing import Any

import torch

ENOUGH = 4  # times D texts


def calibrate(embedder: Any, texts: Sequence[tuple[str, str]], progress: bool | None = None) -> None:
    """Set the start of an embedder's pool by texts such as it will embed; see `TrainablePool.calibrate`.

    Args:
        texts: each behind its prompt, which may be empty. progress: whether a bar is shown, as of `encode`.

    Raises:
        ValueError: a pool that does not whiten, or was calibrated or trained before; what the pool's own raises.
    """
    pool = embedder.pooler.pool
    if not pool.uncalibrated:
        raise ValueError(
            f"the pool of this {embedder.backbone.design} embedder has no start to calibrate: a MultiLayerPool with "
            "whiten=True has, until it is calibrated or trained. It is the default of multi-layer designs "
            'on a pretrained language model, elsewhere pooler={"whiten": True}'
        )
    if len(texts) < 2:
        raise ValueError(f"calibrating needs at least 2 texts, some thousand to be good, got {len(texts)}")
    rows = []
    with pool.unnormalized():
        for prompt in dict.fromkeys(prompt for prompt, _ in texts):
            own = [text for before, text in texts if before == prompt]
            rows.append(embedder.encode(own, prompt=prompt or None, convert_to_tensor=True, show_progress_bar=progress))
    pool.calibrate(torch.cat(rows))
