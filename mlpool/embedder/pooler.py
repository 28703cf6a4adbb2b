"""The second module of an embedder: token_embeddings or layer_states → sentence_embedding."""

from pathlib import Path
from typing import Any, Self

from sentence_transformers.base.modules import Module
from torch import Tensor

from ..files import read_json
from ..pooling.base import CONFIG_NAME, Pool
from ..pooling.registry import find_pool
from .base_model import hub_options


class Pooler(Module):
    """A pool of `mlpool.pooling` as a module of a SentenceTransformer.

    Args:
        pool: reads `layer_states` [B, L, D] where the backbone gives them, `token_embeddings` otherwise.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Put sentence_embedding [B, D], of unit length, into the features."""
        if "layer_states" in features:
            embedding = self.pool(layer_states=features["layer_states"])
        else:
            masks: dict[str, Tensor | None] = {"token_mask": features.get("token_mask")}
            if "cu_seqlens" in features:
                masks["cu_seqlens"] = features["cu_seqlens"]
            else:
                masks["attention_mask"] = features["attention_mask"]
            embedding = self.pool(features["token_embeddings"], **masks)
        features["sentence_embedding"] = embedding
        return features

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.pool.hidden_size  # type: ignore[return-value]

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """Write `config.json` and `pool.safetensors`."""
        self.pool.save_pretrained(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> Self:  # type: ignore[override]
        """Load what `save` wrote, from a folder or a Hub repository.

        Raises:
            FileNotFoundError, ValueError: a missing, damaged or foreign file, named; see `Pool.from_pretrained`.
        """
        hub = hub_options(options)
        path = cls.load_file_path(model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
        config = {} if path is None else read_json(path)
        try:
            pool_class = find_pool(config.get("pool"), config.get("package"))
        except ValueError as error:
            raise ValueError(
                f"{model_name_or_path}/{subfolder}/{CONFIG_NAME}: {error}; the file is missing or damaged, or was "
                "written by a newer mlpool"
            ) from error
        folder = cls.load_dir_path(model_name_or_path, subfolder, **hub)
        return cls(pool_class.from_pretrained(Path(str(folder))))
