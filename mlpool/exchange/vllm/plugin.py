"""The entry point of the group `vllm.general_plugins`, which vLLM calls in each of its processes.

It adds one architecture and nothing else, so that models of others are served as if mlpool were not there. What is
wrong with a folder or a version is said where such a folder is served.
"""

from . import ARCHITECTURE


def register() -> None:
    """Tell vLLM of the architecture; called by vLLM, once or more a process."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.model:EmbeddingModel")
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from .config import EmbeddingConfig
    except ImportError:  # another version: the model itself says so, and only where it is served
        return
    MODELS_CONFIG_MAP[ARCHITECTURE] = EmbeddingConfig
