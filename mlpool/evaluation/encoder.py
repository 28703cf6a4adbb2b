"""A SentenceTransformer as mteb calls it: instructions by policy, token budgets, and corpora embedded once."""

import difflib
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import yaml
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from ..embedder.identity import identity, with_settings
from ..files import replacing
from ..pooling.base import log_once
from .tasks import BARE, PAPER, import_mteb

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.abstasks.task_metadata import TaskMetadata


# --- instructions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    r"""What stands before a text.

    Attributes:
        source: "mteb" (each task's instruction in mteb's metadata, else its type's), "model" (the prompts stored in
            the model, found by mteb's rules, or its default), "none", or a mapping from a task's name, a type of
            tasks or "default" to an instruction.
        template: how an instruction becomes a prompt: "{instruction} " as in the paper, or say
            "Instruct: {instruction}\nQuery: ". Not used for the model's own prompts, which are complete.
        exact: as the code of arXiv 2409.02727 evaluates: no space between instruction and text, and in reranking
            documents get the instruction too. What a mapping does not have is mteb's.

    In retrieval and reranking only the queries get one; a model's own "document" prompt is used for documents.
    """

    source: str | dict[str, str] = "mteb"
    template: str = BARE
    exact: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.source, str) and self.source not in ("mteb", "model", "none"):
            raise ValueError(f"prompts must be 'mteb', 'model', 'none' or a mapping, got {self.source!r}")
        if "{instruction}" not in self.template:
            raise ValueError(f"the template must contain {{instruction}}, got {self.template!r}")

    @classmethod
    def load(cls, source: str, template: str = BARE) -> Self:
        """From "mteb", "model", "none", "paper-exact" (with "=PATH" behind it its wording) or the path of a JSON or
        YAML file.

        Raises:
            FileNotFoundError: neither a source nor a file. ValueError: a file that holds no mapping of strings.
        """
        if source in ("mteb", "model", "none"):
            return cls(source, template)
        name, _, wording = source.partition("=")
        if name == "paper-exact":
            if template != BARE:
                raise ValueError(f"paper-exact is without a template; leave out --template {template!r}")
            return replace(cls.load(wording or "mteb"), template="{instruction}", exact=True)
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"prompts must be mteb, model, none, paper-exact or a file; there is no file {path}"
            )
        try:
            found = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict) or not all(isinstance(x, str) for pair in found.items() for x in pair):
            raise ValueError(f"{path} must map names of tasks, types of tasks or 'default' to instructions")
        return cls(found, template)

    @property
    def policy(self) -> Any:
        """What this adds to a model's identity: nothing where the prompts are the model's own, which are in it."""
        if self.source in ("model", "none"):
            return None if self.source == "model" else "none"
        return [self.source, self.template, *(["exact"] if self.exact else [])]

    def check(self, tasks: "Iterable[AbsTask]") -> None:
        """ValueError when a file has no instruction for one of the tasks."""
        if isinstance(self.source, str) or self.exact:
            return
        without = [name_of(task) for task in tasks if self._entry(task.metadata) is None]
        if without:
            near = difflib.get_close_matches(without[0], self.source, n=2)
            raise ValueError(
                f"the prompts have no instruction for {', '.join(without)}; add the names, a type of tasks "
                f'({", ".join(PAPER)}) or "default"' + (f"; found {', '.join(near)}" if near else "")
            )

    def of(self, metadata: "TaskMetadata", kind: str | None, model: SentenceTransformer) -> str | None:
        """The prompt, or None for the model's default. `kind`: "query", "document", or None where both are alike."""
        if self.source == "model":
            from mteb.models.abs_encoder import get_prompt_name
            from mteb.types import PromptType

            stored: Any = model.prompts
            name = get_prompt_name(stored, metadata, PromptType(kind) if kind else None)
            return None if name is None else stored[name]
        if self.source == "none" or (kind == "document" and not (self.exact and metadata.type == "Reranking")):
            return ""
        instruction = None if self.source == "mteb" else self._entry(metadata)
        if instruction is None and (self.source == "mteb" or self.exact):
            instruction = self._of_mteb(metadata)
        return self.template.replace("{instruction}", instruction) if instruction else ""

    def _entry(self, metadata: "TaskMetadata") -> str | None:
        assert isinstance(self.source, dict)
        names = (metadata.dataset["path"], metadata.name, metadata.type, "default")  # a local task's path is its name
        return next((self.source[name] for name in names if name in self.source), None)

    @staticmethod
    def _of_mteb(metadata: "TaskMetadata") -> str:
        from mteb.abstasks.abstask import get_abstask_prompt

        prompt = metadata.prompt
        return (prompt.get("query") if isinstance(prompt, dict) else prompt) or get_abstask_prompt(metadata.name)


def name_of(task: "AbsTask") -> str:
    """A task's name in tables: a local folder, or mteb's name."""
    return getattr(task, "folder", task.metadata.name)


# --- the corpus's embeddings on disk -------------------------------------------------------------------------------


class EmbeddingCache:
    """Embeddings by content: sha256 of identity, prompt and text to a row of a memory-mapped .npy.

    A shard is `NAME.npy` [n, D] and `NAME.keys.npy` [n, 2], two uint64 of each text's hash. NAME is the hash of its
    keys, and both files are put in place whole, keys last: processes that write at once, even the same shard, do no
    harm, and a killed one loses at most the shard it was at.

    Args:
        folder: made when the first shard is written. identity: of the model.
        rows: texts to a shard.
    """

    def __init__(self, folder: Path, identity: str, rows: int = 8192):
        self.folder, self.identity, self.rows = folder / identity, identity, rows
        self._names: set[str] = set()
        self._values: list[NDArray[Any]] = []  # memory-mapped, by shard
        self._keys = np.empty((0, 2), np.uint64)  # sorted
        self._places = np.empty((0, 2), np.int64)  # shard and row of each key

    def get(
        self, texts: Sequence[str], prompt: str | None, encode: Callable[[list[str]], NDArray[Any]]
    ) -> NDArray[Any]:
        """[n, D]: what is stored, and `encode` for the rest, which is stored then. Equal texts are encoded once."""
        keys, first, inverse = np.unique(self._hash(texts, prompt), axis=0, return_index=True, return_inverse=True)
        self._look()
        missing = np.flatnonzero(~self._find(keys)[0])
        # Like lengths together, so that no batch is mostly padding.
        missing = missing[np.argsort([-len(texts[first[i]]) for i in missing], kind="stable")]
        for start in range(0, len(missing), self.rows):
            part = missing[start : start + self.rows]
            self._write(keys[part], encode([texts[i] for i in first[part]]))
        self._look()
        known, rows = self._find(keys)
        if not known.all():
            raise RuntimeError(f"{self.folder}: embeddings just written are not there; was the folder removed?")
        shards, rows = self._places[rows].T
        out = np.empty((len(keys), self._values[shards[0]].shape[1]), self._values[shards[0]].dtype)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._values[shard][rows[here]]
        return out[inverse.reshape(-1)]

    def _hash(self, texts: Sequence[str], prompt: str | None) -> NDArray[np.uint64]:
        start = hashlib.sha256(json.dumps([self.identity, prompt]).encode())
        keys = np.empty((len(texts), 2), np.uint64)
        for i, text in enumerate(texts):
            digest = start.copy()
            digest.update(text.encode("utf-8", "surrogatepass"))
            keys[i] = np.frombuffer(digest.digest()[:16], np.uint64)
        return keys

    def _look(self) -> None:
        """Take up the shards that are new, whoever wrote them."""
        paths = [p for p in sorted(self.folder.glob("*.keys.npy")) if p.name not in self._names and p.name[0] != "."]
        if not paths:
            return
        keys, places = [self._keys], [self._places]
        for path in paths:
            self._names.add(path.name)
            found = np.load(path)
            keys.append(found)
            places.append(np.stack([np.full(len(found), len(self._values)), np.arange(len(found))], 1))
            self._values.append(np.load(path.with_name(path.name.replace(".keys", "")), mmap_mode="r"))
        merged = np.concatenate(keys)
        order = np.lexsort((merged[:, 1], merged[:, 0]))
        self._keys, self._places = merged[order], np.concatenate(places)[order]

    def _find(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which are stored, and where in `_keys`."""
        if not len(self._keys):
            return np.zeros(len(keys), bool), np.zeros(len(keys), np.int64)
        rows = np.minimum(np.searchsorted(self._keys[:, 0], keys[:, 0]), len(self._keys) - 1)
        return (self._keys[rows] == keys).all(1), rows

    def _write(self, keys: NDArray[np.uint64], values: NDArray[Any]) -> None:
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:16]
        for suffix, array in (("npy", values), ("keys.npy", keys)):
            with replacing(self.folder / f"{name}.{suffix}") as new:
                np.save(new, array)


# --- the encoder ---------------------------------------------------------------------------------------------------


def make_encoder(
    model: SentenceTransformer, label: str, prompts: Prompts, *, cache: Path | None = None,
    token_budget: int | None = None, batch_size: int = 32, progress: bool = True,
    embed: Callable[[list[str], str | None, str | None], NDArray[Any]] | None = None,
) -> Any:  # fmt: skip
    """An mteb encoder for `model`, filed under `label` and, as its revision, the identity of model and prompts.

    Args:
        cache: folder for the documents of retrieval and reranking; None keeps none.
        token_budget: largest number of tokens to a forward, where `model.encode` takes one; else `batch_size` counts.
        progress: a bar for encodings of more than 10,000 texts.
        embed: of texts, prompt and kind (as in `Prompts.of`), in the place of the model's own `encode`.

    Returns: an `AbsEncoder` with `texts` and `seconds`: what it has encoded so far and how long that took.
    """
    import_mteb()
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    own = identity(model)
    sizes: dict[str, Any] = {"batch_size": batch_size}
    if token_budget is not None:
        if "token_budget" in inspect.signature(model.encode).parameters:
            sizes = {"token_budget": token_budget}
        else:
            log_once(f"{type(model).__name__}.encode takes no token_budget: batches of {batch_size} texts instead")
    store = EmbeddingCache(cache, own) if cache else None
    # Any other similarity is left to the model's own function.
    similarity = {"cosine": ScoringFunction.COSINE, "dot": ScoringFunction.DOT_PRODUCT}.get(model.similarity_fn_name)

    class Encoder(AbsEncoder):
        def __init__(self) -> None:
            self.model = model
            revision = with_settings(own, prompts.policy)
            self.mteb_model_meta = ModelMeta.create_empty(
                overwrites={"name": label, "revision": revision, "similarity_fn_name": similarity}
            )
            self.texts, self.seconds = 0, 0.0

        def encode(
            self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any
        ) -> NDArray[Any]:
            texts = [text for batch in inputs for text in batch["text"]]
            kind = prompt_type.value if prompt_type else None
            prompt = prompts.of(task_metadata, kind, model)
            if store and kind == "document":
                return store.get(texts, prompt, lambda part: self._encode(part, prompt, kind))
            rows = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # equal texts once
            return self._encode(list(rows), prompt, kind)[[rows[text] for text in texts]]

        def _encode(self, texts: list[str], prompt: str | None, kind: str | None) -> NDArray[Any]:
            start = time.perf_counter()
            embeddings = (embed or self._by_model)(texts, prompt, kind)
            self.texts, self.seconds = self.texts + len(texts), self.seconds + time.perf_counter() - start
            if wrong := np.flatnonzero(~np.isfinite(embeddings).all(1)).tolist():
                raise ValueError(
                    f"{label} embeds {len(wrong)} texts as NaN or infinity, the first: {texts[wrong[0]][:80]!r}"
                )
            return embeddings

        def _by_model(self, texts: list[str], prompt: str | None, kind: str | None) -> NDArray[Any]:
            # Models may route queries and documents through modules of their own.
            encode = {"query": model.encode_query, "document": model.encode_document}.get(kind or "", model.encode)
            # An empty prompt, unlike None, also keeps the model's default prompt away.
            bar = progress and len(texts) > 10_000
            return encode(texts, prompt=prompt, convert_to_numpy=True, show_progress_bar=bar, **sizes)

    return Encoder()
