"""An embedder: a SentenceTransformer that batches by tokens, runs packed, and never saves what it cannot load."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device, truncate_embeddings
from torch import Tensor
from tqdm.auto import tqdm

from .adapters import has_adapter
from .folder import staged, write_manifest
from .texts import TokenIds, check_texts

logger = logging.getLogger("mlpool")

_BLOCK = 4096  # texts tokenized at a time
_ST_BATCH = 32  # what sentence-transformers passes where its user passed nothing
# Largest change of an embedding's coordinate between saving and loading: rounding of unit vectors, no more.
_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_PROBES = ("How many layers does the pool read?", "All of them.", "Zürich, 東京, naïve 🙂", "word " * 40)


class Embedder(SentenceTransformer):
    """A SentenceTransformer of `Backbone` and `Pooler`; made by `mlpool.load`.

    What it adds: `encode` batches by tokens, and `save` reloads what it wrote and compares before it replaces anything.
    """

    # --- encode -------------------------------------------------------------------------------------------------------

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
            inputs: a string or a sequence of strings.
            batch_size: texts a forward at most. None is no limit, nor is 32, sentence-transformers' own default.
            token_budget: tokens a forward, padding counted; None is 16384 on an accelerator, 4096 on a CPU. Halved, and
                kept so for the call, where memory runs out.
            args, kwargs: as of `SentenceTransformer.encode`.

        Returns: by default float32 numpy [N, D], rows in the order of the inputs.

        Raises:
            ValueError: rows that are no strings (named), a token_budget below 1, and what `TextTokenizer` raises.
            RuntimeError: memory runs out for one text alone.
        """
        check_texts([inputs] if isinstance(inputs, str) or not hasattr(inputs, "__len__") else inputs)
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
        self,
        inputs: list[str],
        *,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool,
        output_value: str | None,
        save_to_cpu: bool,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        device: Any = None,
        token_budget: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """sentence-transformers' hook behind `encode`, here and in the workers of a multi-process pool."""
        if output_value != "sentence_embedding":
            return super()._inference(
                inputs, prompt=prompt, batch_size=min(batch_size, _ST_BATCH), show_progress_bar=show_progress_bar,
                output_value=output_value, save_to_cpu=save_to_cpu, normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim, device=device, **kwargs,
            )  # fmt: skip
        device = self._resolve_inference_device(device)
        self.eval()
        backbone: Any = self[0]
        backbone.arrange()
        budget = token_budget or (4096 if device.type == "cpu" else 16384)
        rows: list[Tensor | None] = [None] * len(inputs)
        before = backbone.truncated.count
        with tqdm(total=len(inputs), desc="Encoding", unit="text", disable=not show_progress_bar) as bar:
            # Many blocks' worth of ids fit in memory; the length sort should see as many texts as it can.
            tokens = _join([backbone.token_ids(inputs[i : i + _BLOCK], prompt) for i in range(0, len(inputs), _BLOCK)])
            for part, embeddings in self._batches(tokens, budget, batch_size, device):
                if truncate_dim is not None:
                    embeddings = truncate_embeddings(embeddings, truncate_dim)
                if normalize_embeddings:
                    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
                for row, embedding in zip(part, embeddings.cpu() if save_to_cpu else embeddings, strict=True):
                    rows[row] = embedding
                bar.update(len(part))
        if (cut := backbone.truncated).count > before:
            logger.warning(
                "%d of %d texts were longer than %d tokens and cut there (the longest ever had %d); raise "
                "max_seq_length to read more", cut.count - before, len(inputs), cut.limit, cut.longest,
            )  # fmt: skip
        return torch.stack(rows) if rows else torch.empty(0, device=device)  # type: ignore[arg-type]

    def _batches(
        self, tokens: TokenIds, budget: int, batch_size: int, device: torch.device
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Rows and their embeddings, longest texts first, so that memory runs out at once or not at all."""
        lengths = np.array(tokens.lengths, dtype=np.int64)
        waiting = np.argsort(-lengths, kind="stable").tolist()[::-1]  # the longest is taken from the end
        while waiting:
            part = _take(waiting, lengths, budget, batch_size, self[0].packed)  # type: ignore[arg-type]
            try:
                yield part, self._embed(tokens, part, device)
                continue
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
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
        backbone: Any = self[0]
        features = tokens.packed(part) if backbone.packed else tokens.padded(part, backbone.texts.pad)
        return self(batch_to_device(features, device))["sentence_embedding"]

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
        """Save to a folder: written beside it, loaded again, compared, and only then put in its place.

        Args:
            path: the folder. Whatever fails, what was there before stays.
            verify: load the folder and compare every weight and the embeddings of a few texts. Takes the memory of a
                second model while it lasts.
            model_name, create_model_card, train_datasets: as of `SentenceTransformer.save`.

        Raises:
            RuntimeError: the folder does not give the same model; the message says what differs.
            ValueError: safe_serialization=False; weights are always written as safetensors.
        """
        if not safe_serialization:
            raise ValueError("embedders are saved as safetensors only; leave out safe_serialization=False")
        with staged(path) as stage:
            super().save(str(stage), model_name, create_model_card, train_datasets)
            from .. import __version__

            write_manifest(stage, version=__version__, design=getattr(self[0], "design", None))
            if verify:
                self._verify(stage)

    def save_pretrained(self, path: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """`save`, under the name of transformers."""
        self.save(path, *args, **kwargs)

    @torch.no_grad()
    def _verify(self, folder: Path) -> None:
        training = [module for module in self.modules() if module.training]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            again = reload(self, folder)
            problems = _differences(self, again)
            if not problems:
                dtype = min((self.dtype, again.dtype), key=lambda d: torch.finfo(d).bits)
                ours, theirs = (m.encode(list(_PROBES), convert_to_tensor=True).float() for m in (self, again))
                error = (ours - theirs.to(ours.device)).abs().max().item()
                if not error <= _LIMITS[dtype]:
                    problems = [f"embeddings differ by {error:.1e} (at most {_LIMITS[dtype]:.0e} is rounding)"]
        for module in training:  # encode left evaluation mode behind
            module.training = True
        if problems:
            raise RuntimeError(
                f"not saved: the folder that was written does not load as the same model: {'; '.join(problems[:5])}"
            )


def reload(embedder: SentenceTransformer, folder: str | Path) -> Any:
    """Load what was saved of this embedder, in its dtype and on its device, with its own module classes."""
    classes = {f"{type(m).__module__}.{type(m).__qualname__}": type(m) for m in embedder.children()}
    backbone: Any = embedder[0]
    options: dict[str, Any] = {"dtype": embedder.dtype}
    if not has_adapter(backbone.model):
        options["attn_implementation"] = backbone.attn_implementation
    return type(embedder)._load_with_module_classes(
        str(folder), classes, device=str(embedder.device), trust_remote_code=embedder.trust_remote_code,
        model_kwargs=options, local_files_only=True,
    )  # fmt: skip


def _differences(model: SentenceTransformer, again: SentenceTransformer) -> list[str]:
    """What differs between two models' settings and weights."""
    problems = [
        f"{name} is {getattr(again, name)!r}, not {getattr(model, name)!r}"
        for name in ("prompts", "default_prompt_name", "max_seq_length", "similarity_fn_name", "truncate_dim")
        if getattr(again, name) != getattr(model, name)
    ]
    ours, theirs = model.state_dict(), again.state_dict()
    problems += [f"{name} is missing" for name in ours if name not in theirs]
    problems += [f"{name} was not there before" for name in theirs if name not in ours]
    problems += [
        f"{name} differs"
        for name, tensor in ours.items()
        if name in theirs and not torch.equal(tensor.to(theirs[name].dtype), theirs[name].to(tensor.device))
    ]
    return problems


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


def _join(parts: list[TokenIds]) -> TokenIds:
    skipped = None
    if parts and parts[0].skipped is not None:
        skipped = [n for part in parts for n in part.skipped or ()]
    return TokenIds([ids for part in parts for ids in part.ids], skipped)


def _out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
