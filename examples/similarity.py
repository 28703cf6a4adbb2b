"""Embed a few sentences with MultiLayerPool on a real encoder and print how similar they are.

python examples/similarity.py
"""

from __future__ import annotations

import torch
from minilm import Encoder

from mlpool import MultiLayerPool

SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "The chef cooks pasta in the kitchen.",
    "A cook prepares noodles.",
    "The stock market fell sharply today.",
]


def main() -> None:
    encoder = Encoder()
    # Untrained, the pool starts exactly at mean pooling of the last layer: nothing is lost before training.
    pool = MultiLayerPool(encoder.hidden_size, encoder.num_layers, token_pooling="mean").eval()
    with torch.no_grad():
        embedding = pool(layer_states=encoder(SENTENCES))
    similarity = embedding @ embedding.T

    width = max(map(len, SENTENCES))
    print(" " * (width + 2) + "".join(f"{i:>7}" for i in range(len(SENTENCES))))
    for i, sentence in enumerate(SENTENCES):
        print(f"{i} {sentence:<{width}}" + "".join(f"{s:>7.2f}" for s in similarity[i]))
    print()
    print(pool.plan(batch_size=len(SENTENCES)))


if __name__ == "__main__":
    main()
