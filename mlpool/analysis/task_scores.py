"""Scores of every layer on local tasks of any kind (the paper's figure 2), by mteb's metrics, in one pass.

A task asks an encoder for embeddings. The one here runs the model the first time that it is asked for a text, and keeps
what every layer and every token pooling has for it; asked again, for another layer, it reads that. So a task is
evaluated P · (L+1) times, and its texts are embedded once.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from ..evaluation.encoder import Prompts, make_encoder, name_of
from ..evaluation.evaluate import evaluate_once
from ..files import check_room
from ..show import progress
from ..trunk import find_layers
from .scores import LayerScores
from .states import poolings_of, windows

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

_METRICS = {"cosine_spearman": "Spearman"}  # as the scores of pairs are called


def task_scores(
    model: SentenceTransformer, tasks: "Sequence[AbsTask]", *, token_pooling: str = "all", **options: Any
) -> tuple[LayerScores, list[str]]:
    """The main score of every layer, untrained, on tasks; and the texts of the first, as it asked for them.

    The states of one task, [P, L+1, texts, D] float32, lie in TMPDIR meanwhile.

    Args:
        model: as of `mlpool.analysis.layers.analyse`. tasks: of `mlpool.evaluation.local.local_tasks`.
        token_pooling: "last", "mean", "unit_mean" or "all". A layer's embedding is brought to unit length, as a pool
            brings it.
        options: window, token_budget and progress, as of `windows`.

    Raises:
        ValueError: no task; what local data raises. OSError: no room for the states of a task.
    """
    if not tasks:
        raise ValueError("no tasks to score layers on")
    poolings, count = poolings_of(token_pooling), len(find_layers(model)[1]) + 1
    values: dict[str, list[list[float]]] = {pooling: [] for pooling in poolings}
    own, texts, shown = [], [], options.get("progress", True)  # type: ignore[var-annotated]
    with progress("scores", "layer", len(tasks) * (len(poolings) * count + 1), shown) as bar:
        for task in tasks:
            bar.set_postfix_str(name_of(task))
            with tempfile.TemporaryDirectory() as folder:
                layers = _Layers(model, poolings, count, Path(folder), options)
                encoder = make_encoder(model, "layers", Prompts("model"), progress=False, embed=layers.embed)
                own.append(evaluate_once(encoder, task))
                bar.update()
                for i, pooling in enumerate(poolings):
                    values[pooling].append([])
                    for layer in range(count):
                        layers.place = (i, layer)
                        values[pooling][-1].append(evaluate_once(encoder, task))
                        bar.update()
                texts = texts or layers.texts
            task.unload_data()  # mteb leaves what it did not read
    found = LayerScores(
        [name_of(task) for task in tasks], {p: np.array(v) for p, v in values.items()}, np.array(own),
        tuple(dict.fromkeys(_METRICS.get(score := task.metadata.main_score, score) for task in tasks)),
    )  # fmt: skip
    return found, texts


class _Layers:
    """What every layer has for every text that was asked for.

    place: (token pooling, layer) that `embed` answers with; None is the model's own embedding.
    """

    def __init__(
        self, model: SentenceTransformer, poolings: Sequence[str], count: int, folder: Path, options: dict[str, Any]
    ):
        self.model, self.poolings, self.count, self.folder, self.options = model, poolings, count, folder, options
        self.place: tuple[int, int] | None = None
        self._rows: dict[tuple[str | None, str], tuple[int, int]] = {}  # of a text: its call, and its row there
        self._states: list[NDArray[np.float32]] = []  # by call, [P, L+1, n, D]
        self._own: list[NDArray[np.float32]] = []

    def embed(self, texts: list[str], prompt: str | None, kind: str | None) -> NDArray[np.float32]:
        """[n, D] of unit length."""
        if missing := [text for text in dict.fromkeys(texts) if (prompt, text) not in self._rows]:
            self._run(missing, prompt)
        places = np.array([self._rows[prompt, text] for text in texts])
        sources = self._own if self.place is None else [states[self.place] for states in self._states]
        out = np.empty((len(texts), sources[0].shape[-1]), np.float32)
        for call in np.unique(places[:, 0]):
            here = places[:, 0] == call
            out[here] = sources[call][places[here, 1]]
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), np.finfo(np.float32).tiny)

    @property
    def texts(self) -> list[str]:
        """All that were asked for."""
        return [text for _, text in self._rows]

    def _run(self, texts: list[str], prompt: str | None) -> None:
        call, states = len(self._states), None
        for window in windows(self.model, [(text,) for text in texts], self.poolings, prompt=prompt, **self.options):
            found, embeddings = window.states[0].float().cpu().numpy(), window.embeddings[0].float().cpu().numpy()
            if states is None:
                shape = (len(self.poolings), self.count, len(texts), found.shape[-1])
                check_room(self.folder, 4 * int(np.prod(shape)), "the states of a task's texts; name a larger TMPDIR")
                states = np.lib.format.open_memmap(self.folder / f"{call}.npy", "w+", np.float32, shape)
                own = np.empty((len(texts), embeddings.shape[-1]), np.float32)
            states[:, :, window.rows] = np.moveaxis(found, 0, 2)
            own[window.rows] = embeddings
        assert states is not None
        self._states.append(states)
        self._own.append(own)
        self._rows |= {(prompt, text): (call, row) for row, text in enumerate(texts)}
