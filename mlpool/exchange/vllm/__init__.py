"""vLLM (`vllm serve FOLDER --runner pooling`): what `mlpool export --to vllm` writes, and the plugin that reads it.

`register` is the entry point of the group `vllm.general_plugins`, which vLLM calls in each of its processes. It adds one
architecture and nothing else, so that models of others are served as if mlpool were not there; what is wrong with a
folder or a version is said when such a folder is served.
"""

from __future__ import annotations

ARCHITECTURE = "MlpoolEmbeddingModel"  # in the `architectures` of an exported config.json
SECTION = "mlpool"  # of that file: what the plugin has to know
FORMAT = 1  # of that section
VERSIONS = ("0.32",)  # of vLLM, whose models, poolers and batches the plugin knows
# model_type → where vLLM has its layers. All of them end each layer with `_maybe_add_hidden_state`.
FAMILIES = {
    "llama": ("llama", "LlamaModel"),
    "mistral": ("mistral", "MistralModel"),
    "qwen2": ("qwen2", "Qwen2Model"),
    "qwen3": ("qwen3", "Qwen3Model"),
}


def register() -> None:
    """Tell vLLM of the architecture; called by vLLM, once or more a process."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:EmbeddingModel")
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from .config import EmbeddingConfig
    except ImportError:  # another version: the model itself says so, and only where it is served
        return
    MODELS_CONFIG_MAP[ARCHITECTURE] = EmbeddingConfig


def check_version() -> None:
    """Raises: ImportError for a version of vLLM that the plugin does not know."""
    import vllm

    if not any(vllm.__version__ == known or vllm.__version__.startswith(f"{known}.") for known in VERSIONS):
        raise ImportError(
            f"this is vLLM {vllm.__version__}, and mlpool's plugin knows {' and '.join(VERSIONS)}: install "
            f"'vllm=={VERSIONS[-1]}.*', or an mlpool that knows this one"
        )
