"""Configs: read from YAML, overridden by words of a command line, checked by pydantic with errors of one line.

What a section of a config may hold is made from what takes it: a function's signature, a dataclass's fields.
"""

import difflib
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from .show import shorten, some
from .version import need

_MOST = 100_000  # values in a config; more are aliases of aliases, or one that holds itself
_NAMES = 20  # known ones, in a message


def _need(name: str) -> Any:
    return need(name, "configs need {}: pip install 'mlpool[train]'")


# --- reading ----------------------------------------------------------------------------------------------------------


def read_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), short: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A config's values, unchecked.

    Args:
        source: a YAML file, or its content. overrides: "--key value", "--key=value" or "--key" (true); nested keys by
            dots, values as in YAML, and as they are where they are none.
        short: keys that may hold something else in place of a section with that something as the named entry.

    Raises:
        FileNotFoundError: no such file. ValueError: no valid YAML, no keys and values, words that are no overrides.
    """
    values = copied(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word in ("--", "--="):
            raise ValueError(f"expected --key value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        put(values, key.replace("-", "_"), _scalar(text), short)
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; errors as of `read_config`."""
    if not path.is_file():
        raise FileNotFoundError(f"no config {path}; see configs/ for ready ones")
    yaml = _need("yaml")
    try:
        text = path.read_text(encoding="utf8")
        values = yaml.safe_load(text)
    except (OSError, ModuleNotFoundError):
        raise
    except Exception as error:  # beside YAMLError, whatever the text behind a tag makes a constructor raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is no valid YAML: {why}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(values).__name__}")
    values = copied(values, str(path))
    _refuse_repeated(yaml.compose(text, Loader=yaml.SafeLoader), path)
    return values


def _refuse_repeated(root: Any, path: Path) -> None:
    """Keys that a section has twice, of which YAML's reader takes the last without a word."""
    left, seen = [root], set()
    while left:
        node = left.pop()
        if id(node) in seen or not isinstance(node.value, list):  # an alias is the node itself; a scalar has a text
            continue
        seen.add(id(node))
        lines: dict[str, int] = {}
        for entry in node.value:
            if not isinstance(entry, tuple):  # of a list
                left.append(entry)
                continue
            key, value = entry
            left.append(value)
            if isinstance(key.value, str):
                line = key.start_mark.line + 1
                if key.value in lines:
                    both = f"lines {lines[key.value]} and {line}"
                    raise ValueError(f"{path} has {key.value!r} twice in one section, {both}: keep one of them")
                lines[key.value] = line


def put(values: dict[str, Any], key: str, value: Any, short: Mapping[str, str] | None = None) -> None:
    """Set a dotted key in nested values, in place; what switches a section on or off (true, null) becomes one."""
    *outer, last = key.split(".")
    for i, name in enumerate(outer):
        inner = values.get(name)
        if not isinstance(inner, dict):
            if short and name in short and inner is not None:
                inner = {short[name]: inner}
            elif inner is None or isinstance(inner, bool):
                inner = {}
            else:
                at = ".".join(outer[: i + 1])
                raise ValueError(f"{key} cannot be set: {at} is {shorten(inner)}, not a section with keys")
        values[name] = inner
        values = inner
    values[last] = value


def copied(value: Any, name: str = "the config", seen: Any = None) -> Any:
    """Nested dicts and lists, copied, aliases too."""
    seen = [0] if seen is None else seen
    seen[0] += 1
    if seen[0] > _MOST:
        raise ValueError(f"{name} holds more than {_MOST:,} values; does an alias (*name) hold itself?")
    try:
        if type(value) is dict or (isinstance(value, Mapping) and not isinstance(value, dict)):
            return {key: copied(inner, name, seen) for key, inner in value.items()}
        return [copied(inner, name, seen) for inner in value] if type(value) is list else value
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply; does an alias (*name) hold itself?") from None


def _scalar(text: str) -> Any:
    try:
        value = _need("yaml").safe_load(text)
    except Exception:  # @x, {, 2024-13-01: a text, and what it is for says whether it fits
        return text
    # 007, 1_000 or 1:30 are other numbers in YAML than a command line means.
    return text if isinstance(value, int) and not isinstance(value, bool) and str(value) != text else copied(value)


# --- what fits --------------------------------------------------------------------------------------------------------


def section(name: str, keys: Mapping[str, Any]) -> Any:
    """The type of a dict that may have these keys, each with values of its type; `name` stands in messages."""
    fields = {key: fitting(kind) for key, kind in keys.items()}
    kind: Any = _need("typing_extensions").TypedDict(re.sub(r"\W", "_", name), fields, total=False)
    kind.__pydantic_config__ = _config()
    return Annotated[kind, _need("pydantic").BeforeValidator(functools.partial(_check_names, name, list(keys)))]


def arguments(function: Callable[..., Any], *without: str) -> dict[str, Any]:
    """The named arguments of a function or class, with their types."""
    names = function.__init__.__globals__ if isinstance(function, type) else function.__globals__  # type: ignore[misc]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {
        p.name: p.annotation for p in inspect.signature(function).parameters.values()
        if p.kind in named and p.name not in without
    }  # fmt: skip
    # Each by itself: what is imported for type checkers alone, among those left out, need not be there.
    hints = {name: eval(hint, names) if isinstance(hint, str) else hint for name, hint in found.items()}
    return {name: Any if hint is inspect.Parameter.empty else hint for name, hint in hints.items()}


def check(kind: Any, value: Any, name: str = "") -> Any:
    """The value as `kind` has it: "1e-5" a number where one is due, "false" a bool, sections of `section` in full.

    Raises:
        ValueError: it does not fit; the message names the key (dotted, behind `name`), the value and what fits, or the
            nearest known key.
    """
    try:
        return _adapter(kind).validate_python(value)
    except _need("pydantic").ValidationError as error:
        raise ValueError(_message(error, value, name)) from None


def nearest(name: Any, known: Iterable[Any]) -> str:
    """ "nearest: …" of the known names, or all of them."""
    names = [str(one) for one in known]
    near = difflib.get_close_matches(str(name), names, n=3)
    return f"nearest: {', '.join(near)}" if near else f"known: {some(names, _NAMES)}"


def fitting(kind: Any) -> Any:
    """A type hint as configs mean it: no bool for a number, an integer stays one, and of an enum its values alone."""
    if kind in (int, float):
        return Annotated[kind, _need("pydantic").WrapValidator(_number)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return Annotated[kind, _need("pydantic").BeforeValidator(_no)]
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        enums = any(isinstance(one, type) and issubclass(one, Enum) for one in inner)
        return Union[tuple(fitting(one) for one in inner if not (enums and one is str))]  # noqa: UP007
    if origin is Annotated:
        return Annotated[(fitting(inner[0]), *inner[1:])]
    if origin is None or origin is Literal or origin is type or Ellipsis in inner or list in map(type, inner):
        return kind
    return origin[tuple(map(fitting, inner))] if inner else kind


def _number(value: Any, check: Callable[[Any], Any]) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"a number, not {str(value).lower()}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("a number below 2^63")
    checked = check(value)
    return value if type(value) is int else checked


def _no(value: Any) -> Any:
    return "no" if value is False else value  # YAML 1.1 reads no as false


class _UnknownError(ValueError):
    """A key that is not known."""


def _check_names(section: str, known: Sequence[str], values: Any) -> Any:
    for name in values if isinstance(values, Mapping) else ():
        if name not in known:
            raise _UnknownError(f"unknown {section} {name!r}; {nearest(name, known)}")
    return values


def _config() -> Any:
    return _need("pydantic").ConfigDict(
        arbitrary_types_allowed=True, coerce_numbers_to_str=True, use_enum_values=True, allow_inf_nan=False
    )


@functools.lru_cache(64)  # to make one takes a tenth of a second
def _adapter(kind: Any) -> Any:
    adapter = _need("pydantic").TypeAdapter
    try:
        return adapter(kind, config=_config())
    except Exception:  # a section has its own
        return adapter(kind)


def _message(error: Any, value: Any, name: str) -> str:
    """The innermost of what is wrong, in one line: of a union, what each of its types would take."""
    found = [(_path(one["loc"], value), one) for one in error.errors(include_url=False)]
    for _, one in found:
        if isinstance(unknown := one.get("ctx", {}).get("error"), _UnknownError):
            return f"{name}: {unknown}" if name else str(unknown)
    path = max((path for path, _ in found), key=len)
    mine = [one for at, one in found if at == path]
    fits = " or ".join(dict.fromkeys(_fits(one["msg"]) for one in mine))
    at = ".".join([*([name] if name else []), *map(str, path)])
    given = value
    for key in path:
        given = given[key]
    return f"{at or 'the value'} is {shorten(given)}, expected {fits}"


def _path(places: Sequence[Any], value: Any) -> tuple[Any, ...]:
    """The keys among an error's places; the others are names of types."""
    path = []
    for place in places:
        if (isinstance(value, Mapping) and place in value) or (
            isinstance(value, list | tuple) and isinstance(place, int) and place < len(value)
        ):
            path.append(place)
            value = value[place]
    return tuple(path)


def _fits(message: str) -> str:
    text = message.removeprefix("Value error, ").removeprefix("Input should be ").partition(", unable to")[0]
    text = text.replace("'str' instances are not allowed as a Sequence value", "a list")
    return re.sub(r"\ba valid ([aeiou])", r"an \1", text).replace("a valid ", "a ")
