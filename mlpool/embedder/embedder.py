"""An embedder: a SentenceTransformer that batches by tokens, runs packed, and never saves what it cannot load."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device, truncate_embeddings
from sentence_transformers.util.decorators import deprecated_kwargs
from torch import Tensor

from ..files import write_text
from ..pooling.base import StatesTooLarge, broken_weights
from ..quantized import unpacked_layers
from ..show import progress
from ..version import __version__
from .adapters import has_adapter
from .calibration import calibrate
from .folder import staged, write_manifest
from .saved import as_ours, out_of_memory, verify_saved
from .texts import TokenIds, check_texts

logger = logging.getLogger("mlpool")

_ST_BATCH = 32  # what sentence-transformers passes where its user passed nothing
# Largest change of an embedding's coordinate between saving and loading: rounding of unit vectors, no more.
_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_PROBES = ("How many layers does the pool read?", "All of them.", "Zürich, 東京, naïve 🙂", "word " * 40)


class Embedder(SentenceTransformer):
    """A SentenceTransformer of `Backbone` and `Pooler`; made by `mlpool.load`.

    What it adds: `encode` batches by tokens, and `save` reloads what it wrote and compares before it replaces anything.
    """

    backbone: Any  # its two modules
    pooler: Any
    cache_folder: str | None = None  # of the Hub, where a base model was loaded from
    base_name: str | None = None  # of the folder that a base model was loaded from

    @functools.cached_property
    def _said_cut(self) -> set[int]:
        """The limits of tokens for which it has been said that texts are cut."""
        return set()

    # --- encode -------------------------------------------------------------------------------------------------------

    @deprecated_kwargs(sentences="inputs")
    def encode(  # type: ignore[override]
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        *args: Any,
        token_budget: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Embed texts: `SentenceTransformer.encode`, in batches of about equal work.

        Args:
            inputs: a string, or strings in any order-keeping collection (list, array, column, generator).
            batch_size: texts a forward at most. None is no limit, nor is 32, sentence-transformers' own default.
            token_budget: tokens a forward, padding counted; None is 16384 on an accelerator, on a CPU 4096 packed
                and 512 padded. Halved, and kept so for the call, where memory runs out.
            args, kwargs: as of `SentenceTransformer.encode`.

        Returns: by default float32 numpy [N, D], rows in the order of the inputs.

        Raises:
            ValueError: rows that are no strings, a token_budget below 1, embeddings that would be NaN or infinite (rows
                named), and what `TextTokenizer` raises.
            RuntimeError: memory runs out for one text alone.
        """
        if not isinstance(inputs, str):
            if isinstance(inputs, Mapping | Set) or not isinstance(inputs, Iterable):
                raise ValueError(f"inputs must be a string or a list of strings, got {type(inputs).__name__}")
            inputs = list(inputs)
            check_texts(inputs)
        if token_budget is not None:
            if token_budget < 1:
                raise ValueError(f"token_budget must be at least 1 token, got {token_budget}")
            kwargs["token_budget"] = token_budget
        limit = 2**31 if batch_size in (None, _ST_BATCH) else batch_size
        return super().encode(inputs, prompt_name, prompt, limit, *args, **kwargs)

    def get_model_kwargs(self) -> list[str]:
        return [*super().get_model_kwargs(), "token_budget"]

    @torch.inference_mode()
    def _inference(  # type: ignore[override]
        self, inputs: list[str], *, prompt: str | None, batch_size: int, show_progress_bar: bool,
        output_value: str | None, save_to_cpu: bool, normalize_embeddings: bool, truncate_dim: int | None,
        device: Any = None, token_budget: int | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """sentence-transformers' hook behind `encode`, here and in the workers of a multi-process pool."""
        if output_value != "sentence_embedding":
            return super()._inference(
                inputs, prompt=prompt, batch_size=min(batch_size, _ST_BATCH), show_progress_bar=show_progress_bar,
                output_value=output_value, save_to_cpu=save_to_cpu, normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim, device=device, **kwargs,
            )  # fmt: skip
        device = self._resolve_inference_device(device)
        if any(module.training for module in self.modules()):  # eval() drops the pool's folded weights
            self.eval()
        self.backbone.arrange()
        budget = token_budget or self.default_budget(device)
        rows: list[Tensor | None] = [None] * len(inputs)
        before = self.backbone.truncated.count
        with progress("Encoding", "text", len(inputs), bool(show_progress_bar)) as bar:
            tokens = self.backbone.token_ids(inputs, prompt)
            for part, embeddings in self._batches(tokens, budget, batch_size, device):
                if truncate_dim is not None:
                    embeddings = truncate_embeddings(embeddings, truncate_dim)
                if normalize_embeddings:
                    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
                for row, embedding in zip(part, embeddings.cpu() if save_to_cpu else embeddings, strict=True):
                    rows[row] = embedding
                bar.update(len(part))
        if (cut := self.backbone.truncated).count > before and cut.limit not in self._said_cut:
            self._said_cut.add(cut.limit)
            logger.warning(
                "%d of %d texts were longer than %d tokens and cut there (the longest had %d); raise max_seq_length to "
                "read more. Said once; model[0].truncated counts on", cut.count - before, len(inputs), cut.limit,
                cut.longest,
            )  # fmt: skip
        if not rows:
            return torch.empty(0, device=device)
        made = torch.stack(rows)  # type: ignore[arg-type]
        _check_finite(made, self)
        return made

    def default_budget(self, device: torch.device) -> int:
        """Tokens a forward. Padded on a CPU, few: the states of many short texts at once do not stay in its caches."""
        if device.type != "cpu":
            return 16384
        return 4096 if self.backbone.packed else 512

    def _batches(
        self, tokens: TokenIds, budget: int, batch_size: int, device: torch.device
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Rows and their embeddings, longest texts first, so that memory runs out at once or not at all."""
        lengths = np.array(tokens.lengths, dtype=np.int64)
        waiting = np.argsort(-lengths, kind="stable").tolist()[::-1]  # the longest is taken from the end
        while waiting:
            part = _take(waiting, lengths, budget, batch_size, self.backbone.packed)
            try:
                yield part, self._embed(tokens, part, device)
                continue
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise RuntimeError(
                        f"memory ran out for one text alone (row {part[0]}, {lengths[part[0]]} tokens); lower "
                        f"max_seq_length (now {self.max_seq_length}), or use a smaller dtype or another device"
                    ) from error
            # Outside the except block: the error holds the failed forward's tensors.
            budget = max(1, int(lengths[part].sum()) // 2)
            logger.warning("out of memory at %d texts; going on with %d tokens a forward", len(part), budget)
            waiting += part[::-1]
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _embed(self, tokens: TokenIds, part: Sequence[int], device: torch.device) -> Tensor:
        features = tokens.packed(part) if self.backbone.packed else tokens.padded(part, self.backbone.texts.pad)
        try:
            return self(batch_to_device(features, device))["sentence_embedding"]
        except StatesTooLarge as error:
            raise StatesTooLarge(part[error.row], error.largest) from None

    def calibrate(
        self, texts: Sequence[str], prompt_name: str | None = None, show_progress_bar: bool | None = None
    ) -> None:
        """Whiten this embedder by texts such as it will embed, without labels or training; see `pooling/whitening.py`.

            embedder = mlpool.load(decoder, design="multi-layer-causal-mean")
            embedder.calibrate(texts)  # some thousands; training takes 4 times D

        `mlpool train` and `fit` do so by themselves, with their own texts.

        Args:
            prompt_name: of the prompt before them, as of `encode`.

        Raises:
            ValueError: fewer than 2 texts, an unknown prompt, a pool that does not whiten or was calibrated before.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a list of strings, got one string")
        name = prompt_name or self.default_prompt_name
        if name and name not in self.prompts:
            raise ValueError(f"there is no prompt {name!r}; stored are {', '.join(self.prompts) or 'none'}")
        prompt = (self.prompts[name] if name else "") or ""
        calibrate(self, [(prompt, text) for text in texts], show_progress_bar)

    # --- save ---------------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
        verify: bool = True,
    ) -> None:
        """Save to a folder: written aside, loaded again, compared, and only then put in its place.

        Args:
            path: the folder. Whatever fails, what was there before stays.
            verify: load the folder and compare every weight and the embeddings of a few texts. Takes the memory of a
                second model while it lasts, on the CPU where the model's own device has no room.
            model_name, create_model_card, train_datasets: as of `SentenceTransformer.save`.

        Raises:
            RuntimeError: the folder does not give the same model; the message says what differs.
            ValueError: safe_serialization=False; weights are always written as safetensors. An adapter's own base
                model's folder.
        """
        model = self.backbone.model
        if has_adapter(model) and Path(path).resolve() == Path(model.name_or_path).resolve():
            raise ValueError(f"{path} holds the base model of this adapter; save into another folder, or merge first")
        if not safe_serialization:
            raise ValueError("embedders are saved as safetensors only; leave out safe_serialization=False")
        if faults := broken_weights(self):
            raise RuntimeError(f"not saved: {'; '.join(faults[:5])}; what was in {path} stays")
        with self.undisturbed(), staged(path) as stage:
            super().save(str(stage), model_name, create_model_card, train_datasets)
            write_manifest(stage, version=__version__, design=self.backbone.design)
            if verify:
                verify_saved(self, stage)

    def save_pretrained(self, path: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """`save`, under the name of transformers."""
        self.save(path, *args, **kwargs)

    def _create_model_card(self, path: str, *args: Any, **kwargs: Any) -> None:
        super()._create_model_card(path, *args, **kwargs)
        card = Path(path) / "README.md"
        if card.is_file():
            model = self.backbone.model
            base = self.base_name or (Path(model.name_or_path).name if has_adapter(model) else None)
            text = as_ours(card.read_text(encoding="utf8"), self.model_card_data.model_id, base)
            write_text(card, text)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Mode, random state and counts are afterwards as before, though a model card and a comparison embed texts."""
        training = [module for module in self.modules() if module.training]
        cut = self.backbone.truncated
        # While training in mixed precision, accelerate has put autocast around forward; the folder knows nothing of it.
        wrapped = self.__dict__.pop("forward", None)
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), torch.no_grad():
                yield
        finally:
            self.backbone.texts.truncated = cut
            if wrapped is not None:
                self.__dict__["forward"] = wrapped
            for module in training:
                module.training = True

    def disagreement(self, ours: Tensor, theirs: Tensor, embed: Callable[[], Tensor]) -> tuple[float, float]:
        """How far other embeddings are from this model's, and how far rounding may take them.

        Where it is more than unit vectors round in this precision, the model itself says what the precision does to
        it (a deep decoder with large states amplifies every rounding): both are compared with the same weights in
        float64, and the others may be off by twice what this model is, and the rounding of a unit vector.

        Args:
            ours: this model's embeddings [B, D]. theirs: of the same texts. embed: makes `ours` again, as the model is
                then; called with the weights in float64.

        Returns: the largest difference of a coordinate, and the largest that is rounding. NaN agrees with nothing.
        """
        floor = _LIMITS[self.dtype]  # type: ignore[index]
        error = _distance(ours, theirs)
        if error <= floor or self.dtype == torch.float64:
            return error, floor
        with self.in_float64():
            exact = embed()
        return _distance(exact, theirs), 2 * _distance(exact, ours) + floor

    @contextmanager
    def in_float64(self) -> Iterator[None]:
        """Every weight in float64 meanwhile, and afterwards as it was: float64 holds all narrower numbers exactly."""
        with unpacked_layers(self):
            tensors = (*self.parameters(), *self.buffers())
            kept = [(tensor, tensor.dtype) for tensor in tensors if tensor.is_floating_point()]
            try:
                for tensor, _ in kept:
                    tensor.data = tensor.data.double()
                self.eval()
                yield
            finally:
                for tensor, dtype in kept:
                    tensor.data = tensor.data.to(dtype)
                self.eval()  # drops what was folded from the wide weights

    def _probe(self) -> Tensor:
        """Embeddings of a few texts, whatever prompts and limits there are; leaves evaluation mode behind."""
        self.eval().backbone.arrange()
        embeddings = self._embed(self.backbone.token_ids(_PROBES), range(len(_PROBES)), self.device)
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    def set_pooling_include_prompt(self, include_prompt: bool) -> None:
        """Whether the prompt's tokens are pooled, or only read by the model."""
        self.backbone.include_prompt = include_prompt


def _check_finite(embeddings: Tensor, model: SentenceTransformer) -> None:
    finite = embeddings.isfinite().all(1)
    if bool(finite.all()):
        return
    rows = (~finite).nonzero().flatten().tolist()
    why = "; ".join(broken_weights(model)[:2]) or (
        f"all weights are finite, so numbers left the range of {model.dtype} on the way: load with dtype float32 or "
        "bfloat16, and look at these texts"
    )
    raise ValueError(f"row {rows[0]}: its embedding is NaN or infinite (rows {rows[:10]}, {len(rows)} in all); {why}")


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return (ours.double() - theirs.to(ours.device).double()).abs().max().item()


def _take(waiting: list[int], lengths: np.ndarray, budget: int, batch_size: int, packed: bool) -> list[int]:
    """The next rows, removed from the end of `waiting`: as many as the budget allows, at least one."""
    longest, total, count = int(lengths[waiting[-1]]), 0, 0
    for row in reversed(waiting):
        total += int(lengths[row])
        cost = total if packed else longest * (count + 1)
        if count and (cost > budget or count >= batch_size):
            break
        count += 1
    part = waiting[-count:][::-1]
    del waiting[-count:]
    return part
