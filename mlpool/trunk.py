"""A transformers model's trunk: where its layers are, what its forward takes, and another forward in its place."""

import functools
import inspect
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LIST_NAMES = ("layers", "layer", "h", "block", "blocks")
# Of each model the names of its trunk and its list: every forward asks, and a search through all modules takes longer
# than many an operation of a layer's.
_known: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()


def find_layers(model: nn.Module) -> tuple[Any, nn.ModuleList]:
    """Find a model's trunk and its layers.

    The layers are the ModuleList named `layers`, `layer`, `h`, `block` or `blocks` with as many entries as the
    (text) config's num_hidden_layers; the trunk is the innermost module around it that takes input_ids, such as
    LlamaModel, BertModel or OPTDecoder. Wrappers around the trunk (heads, peft, SentenceTransformer) do not matter.

    Raises:
        ValueError: an encoder-decoder model, no such list or several (the message lists every ModuleList), or a
            layer that is in the list twice.
    """
    if model in _known and (place := _at(model, *_known[model])) is not None:
        return place
    modules = dict(model.named_modules())
    if any(getattr(getattr(module, "config", None), "is_encoder_decoder", False) for module in modules.values()):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, whose two stacks have no one list of hidden states; "
            "load its encoder alone (for T5: T5EncoderModel)"
        )
    lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    fitting = [
        (name, trunk)
        for name, entries in lists.items()
        if name.split(".")[-1] in _LIST_NAMES
        and (trunk := _trunk_of(name, modules)) is not None
        and len(entries) == getattr(text_config(modules[trunk]), "num_hidden_layers", None)
    ]
    # Experts may be as many as layers: take the outermost list. A vision tower may be as deep: the innermost trunk.
    found = [
        (name, trunk)
        for name, trunk in fitting
        if not any(_inside(name, other) or _inside(other_trunk, trunk) for other, other_trunk in fitting)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{'several lists' if found else 'no list'} of layers in {type(model).__name__}: looked for one ModuleList "
            f"called {', '.join(_LIST_NAMES)} with config.num_hidden_layers entries, inside a module that has a config "
            f"and takes input_ids; fitting: {', '.join(name for name, _ in found) or 'none'}; all ModuleLists "
            f"(entries): {', '.join(f'{name} ({len(entries)})' for name, entries in lists.items()) or 'none'}"
        )
    ((name, trunk_name),) = found
    if len(set(map(id, lists[name]))) < len(lists[name]):
        raise ValueError(f"{name} holds the same layer more than once; taps need every layer to run once")
    _known[model] = trunk_name, name
    return modules[trunk_name], lists[name]


def _at(model: nn.Module, trunk_name: str, name: str) -> tuple[nn.Module, nn.ModuleList] | None:
    """What stands at these names now, if it is still a trunk and as many layers as its config says."""
    try:
        trunk, layers = model.get_submodule(trunk_name), model.get_submodule(name)
        count = text_config(trunk).num_hidden_layers
    except AttributeError:
        return None
    fits = isinstance(layers, nn.ModuleList) and len(layers) == count == len(set(map(id, layers)))
    return (trunk, layers) if fits else None  # type: ignore[return-value]


def _trunk_of(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The name of the innermost module around `name` that takes input_ids and has a config."""
    while name:
        name = name.rpartition(".")[0]
        module = modules[name]
        # The image part of Phi-4 multimodal takes input_ids too, to find its places in the text.
        embeds = hasattr(module, "get_input_embeddings") or not hasattr(modules[""], "get_input_embeddings")
        if hasattr(module, "config") and embeds and "input_ids" in argument_names(module):
            return name
    return None


def _inside(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))


def argument_names(module: nn.Module) -> list[str]:
    """Of the class's forward: a patched instance may not tell."""
    return _names(type(module).forward)


@functools.cache  # they are asked for in every forward
def _names(forward: Any) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def no_cache(trunk: nn.Module) -> dict[str, bool]:
    """The argument by which a forward keeps no cache; {} where it takes none."""
    return {"use_cache": False} if "use_cache" in argument_names(trunk) else {}


def text_config(module: nn.Module) -> Any:
    """The config of the text model: a multimodal one has several."""
    config: Any = module.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def family_name(trunk: nn.Module) -> str:
    """transformers' name of the family, or the class's where it has none."""
    return getattr(trunk.config, "model_type", type(trunk).__name__)


@functools.cache
def mixed(mixin: type, cls: type) -> Any:
    """A subclass of `cls` with `mixin` before it.

    One for all modules of a class, so that code compiled for one layer serves the others; and of the same name, since
    sharding and saving look modules up by it.
    """
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made = type(cls.__name__, (mixin, cls), names)
    # transformers 5.23 wraps the forward of every new subclass, to checkpoint in the outermost wrapper: a recompute
    # after an undo would then find another one outermost than the forward did, and checkpoint within the checkpoint.
    if "forward" in made.__dict__:
        del made.forward  # type: ignore[attr-defined]
    return made


class ForwardPatch:
    """Stands as a trunk's `forward`, on the instance, until it is restored.

    No hook, since peft calls `trunk.forward` directly. It has slots so that wrappers which copy a function's `__dict__`
    (functools.update_wrapper, as accelerate uses it) take nothing from it.
    """

    __slots__ = ("below", "trunk")

    def __init__(self, trunk: Any):
        self.trunk = trunk
        self.below = trunk.__dict__.get("forward")  # someone else's patch, or None
        trunk.forward = self

    def restore(self) -> bool:
        """Whether it could be undone: wrapped by someone else since, it stays beneath and has to do nothing."""
        if self.trunk.__dict__.get("forward") is not self:
            return False
        if self.below is None:
            del self.trunk.forward
        else:
            self.trunk.forward = self.below
        return True
