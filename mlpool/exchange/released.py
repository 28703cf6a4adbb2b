"""The paper's released folders, a LoRA adapter of a causal LM beside `attn_pool.pt`, as embedders.

What the files do not say has to be said: whether attention was causal or bidirectional, and the pooler's heads. The
adapter's names start where the causal LM's do (`model.layers.0…`); an embedder's backbone is the model inside.

Source: the released code and checkpoints of arXiv 2409.02727, designs 1 to 5. Its trainer writes `OUTattn_pool.pt`
beside the folder OUT; its layer table has 32 rows, of which the base's layers are read; design 1 has no pooler.

Two things are otherwise here. Padding is masked in design 4, where theirs pools it as text. In design 5 theirs leaves
out of the mean every token whose id is the pad token's, so a text that spells it out (say `<unk>`) loses it, and the
mean moves by some 1e-2; here a token of the text is text. `tokenizer.pad_token` set to one that no text holds, before
anything is embedded with their code, makes both the same.
"""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..embedder.adapters import _peft, fingerprint
from ..embedder.designs import DESIGNS, Design, find_design
from ..embedder.embedder import Embedder
from ..embedder.loading import load
from ..pooling.base import Pool
from ..pooling.checkpoints import RELEASED, read_tensors
from ..show import some
from ..trunk import find_layers

logger = logging.getLogger("mlpool")

CONFIG, POOL = "adapter_config.json", "attn_pool.pt"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_NAMED = 3  # tensors in an error message


def import_released(
    folder: str | Path, base: str | Path, design: str | int | None = None, num_heads: int = 32, **options: Any
) -> Embedder:
    """Read a released folder.

        embedder = import_released("released/", base="mistralai/Mistral-7B-v0.1", design=5)
        embedder.save("design-5")

    Args:
        folder: with `adapter_config.json`, `adapter_model.safetensors` or `.bin`; in it or beside it `attn_pool.pt`.
        base: the base model that the adapter was trained on, a folder or Hub name.
        design: 1 to 5 or its name; the file tells 2 and 4 from 3 and 5, nothing tells causal from bidirectional.
            Without the file it is 1, or another name of a design without a trained pooler.
        num_heads: of the pooler; the released ones have 32.
        options: of `mlpool.load`: max_seq_length, prompts, dtype, device and so on.

    Raises:
        FileNotFoundError: a file is missing. ValueError: it is damaged, does not fit the base model (tensors named) or
            the design, no or a wrong design. ModuleNotFoundError: peft is missing.
    """
    _peft()
    folder = Path(folder)
    config, adapter = _read_adapter(folder)
    path = _pool_file(folder)
    chosen = _design(path, design) if path else _design_without_pool(folder, design)
    kind: Any = chosen.pool
    sizes = {"num_heads": num_heads, "token_pooling": chosen.token_pooling}
    # What is wrong with the file shows before the base model is loaded.
    pool: Any = kind.from_released(path, **sizes) if path else None
    embedder = load(base, chosen.name, **options)
    backbone: Any = embedder[0]
    if path:
        if getattr(pool, "num_layers", 0) > backbone.num_layers:
            logger.warning(
                "%s has rows for %d layers and the base model has %d: the first are read, as in theirs", path,
                pool.num_layers, backbone.num_layers,
            )  # fmt: skip
            pool = kind.from_released(path, **sizes, num_layers=backbone.num_layers)
        _check_pool(pool, backbone.hidden_size, backbone.num_layers, path)
    _add_adapter(backbone.model, config, adapter, str(base), folder)
    backbone.base_fingerprint = fingerprint(backbone.model)
    if pool is not None:
        embedder[1].pool = pool.to(embedder.device)
    return embedder.eval()


def _pool_file(folder: Path) -> Path | None:
    """`attn_pool.pt` in the folder, or beside it under a name that begins with the folder's; None where neither is."""
    whole = folder.resolve()
    return next((path for path in (folder / POOL, whole.with_name(whole.name + POOL)) if path.is_file()), None)


def _read_adapter(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The LoRA config, and the tensors by name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; expected the authors', with {CONFIG}, {WEIGHTS[0]} and {POOL}")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; expected {CONFIG}, {WEIGHTS[0]} (or .bin) and {POOL}")
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has neither {' nor '.join(WEIGHTS)}; expected one of them")
    peft = _peft()
    try:
        config = peft.PeftConfig.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"{folder / CONFIG} is a {type(config).__name__}, expected LoRA's")
    return config, read_tensors(found[0])


def _design(path: Path, design: str | int | None) -> Design:
    """The design that was asked for, if the file is of its kind."""
    layers = RELEASED["layer_weights"] in read_tensors(path)
    fitting = [d for d in DESIGNS.values() if d.has_latents and d.reads_all_layers == layers]
    listed = " or ".join(f"{d.number} ({d.attention})" for d in fitting)
    has = "has layer weights" if layers else "has no layer weights"
    if design is None:
        raise ValueError(f"{path} {has}, so its design is {listed}, which no file says: pass design= (--design)")
    chosen = find_design(design)
    if chosen not in fitting:
        raise ValueError(f"{path} {has}, so its design is {listed}, not {chosen.number or chosen.name}")
    return chosen


def _design_without_pool(folder: Path, design: str | int | None) -> Design:
    """The design that was asked for, if it has no trained pooler."""
    chosen = None if design is None else find_design(design)
    if chosen is None or chosen.trainable:
        beside = folder.resolve().name + POOL
        raise FileNotFoundError(
            f"{folder} has no {POOL}, nor is there {beside} beside it; expected {CONFIG}, {WEIGHTS[0]} (or .bin) and "
            f"{POOL}. Design 1 alone has no pooler: pass design=1 (--design 1)"
        )
    return chosen


def _check_pool(pool: Pool, hidden_size: int, num_layers: int, path: Path) -> None:
    for what, found, expected in (
        ("hidden size", pool.hidden_size, hidden_size), ("layers", getattr(pool, "num_layers", num_layers), num_layers),
    ):  # fmt: skip
        if found != expected:
            raise ValueError(
                f"{path} is for another base model: {what} {found}, expected {expected} of the one given as base"
            )


def _add_adapter(model: nn.Module, config: Any, tensors: dict[str, Tensor], base: str, folder: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    trained_on = config.base_model_name_or_path
    if trained_on and Path(trained_on).name != Path(base).name:
        logger.warning("the adapter was trained on %s, and base is %s: make sure they are the same", trained_on, base)
    config.task_type = "FEATURE_EXTRACTION"
    model.add_adapter(config)  # type: ignore[operator]
    expected = get_peft_model_state_dict(model, adapter_name="default")
    prefixes = ("base_model.model.", f"{find_layers(model)[0].base_model_prefix}.")
    state = {}
    for name, tensor in tensors.items():
        for prefix in prefixes:
            if name not in expected:
                name = name.removeprefix(prefix)
        if not name.startswith("lm_head."):  # of the causal LM, and nothing that an embedding depends on
            state[name] = tensor
    problems = [f"it lacks {name}" for name in expected if name not in state]
    problems += [f"it has {name}, the model has not" for name in state if name not in expected]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(
            f"the adapter in {folder} does not fit the base model {base}, it is for another one: "
            f"{some(problems, _NAMED, '; ')}"
        )
    set_peft_model_state_dict(model, state, adapter_name="default")
