"""vLLM (`vllm serve FOLDER --runner pooling`): what `mlpool export --to vllm` writes, and the plugin that reads it.

Of these modules `folder` needs transformers, the others vLLM.
"""

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


def check_version() -> None:
    """Raises: ImportError for a version of vLLM that the plugin does not know."""
    import vllm

    if not any(vllm.__version__ == known or vllm.__version__.startswith(f"{known}.") for known in VERSIONS):
        raise ImportError(
            f"this is vLLM {vllm.__version__}, and mlpool's plugin knows {' and '.join(VERSIONS)}: install "
            f"'vllm=={VERSIONS[-1]}.*', or an mlpool that knows this one"
        )
