"""What has to hold before an exported folder is served; vLLM asks when it builds its configuration."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from . import FAMILIES, FORMAT, SECTION, check_version


class EmbeddingConfig(VerifyAndUpdateConfig):
    """vLLM's hook for our architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Set how texts are pooled, which tells vLLM whether they may be read in parts or from its cache of prefixes.

        Raises: ImportError, ValueError: see `check_version` and `settings_of`.
        """
        check_version()
        settings = settings_of(model_config.hf_config)
        pooler = model_config.pooler_config
        if pooler is None:
            return  # vLLM refuses it: there is nothing to generate with
        pooler.seq_pooling_type = "LAST" if settings["token_pooling"] == "last" else "MEAN"
        if pooler.dimensions is None:
            pooler.dimensions = settings["truncate_dim"]

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what would pool parts of texts.

        Raises: ValueError: an option that this design cannot have, named.
        """
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        design = settings_of(model.hf_config)["design"]
        for option, given, possible in (
            ("--enable-chunked-prefill", vllm_config.scheduler_config.enable_chunked_prefill,
             model.is_chunked_prefill_supported),
            ("--enable-prefix-caching", vllm_config.cache_config.enable_prefix_caching,
             model.is_prefix_caching_supported),
            ("--enable-dbo", parallel.use_ubatching, False),
            ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size > 1, False),
        ):  # fmt: skip
            if given and not possible:
                raise ValueError(
                    f"{design} needs all tokens of a text in one forward, and {option} divides them; leave it out"
                )


def settings_of(config: Any) -> dict[str, Any]:
    """The section of an exported config.json.

    Raises: ValueError: none, of another format, or of a family that the plugin does not know.
    """
    settings = getattr(config, SECTION, None)
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        found = settings.get("format") if isinstance(settings, dict) else "none"
        raise ValueError(
            f'config.json needs a section "{SECTION}" of format {FORMAT}, got {found}; export the embedder with this '
            "mlpool: mlpool export FOLDER -o OUT --to vllm"
        )
    if config.model_type not in FAMILIES:
        raise ValueError(f"mlpool's plugin serves {', '.join(FAMILIES)}, got a {config.model_type}")
    return settings
