"""`mlpool fit`: the pool alone, on layer states of a frozen base that are taken once.

A step of `mlpool train` runs the base over its texts; here the base has run before, once for each text, and a step is
the pool's alone. So many pools, learning rates and seeds can be tried, and the best by dev data goes on with LoRA:

    mlpool fit fit.yaml
    mlpool train train.yaml --model runs/fit --lora true

In output_dir: the best as an embedder, fit.json (every trial), trials/ (the pool of each), states/.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..embedder import Embedder, load
from ..embedder.designs import build_pool
from ..embedder.folder import recover
from ..files import check_folder_name, check_room, read_json, sha256, write_json
from ..pooling.base import WEIGHTS_NAME, Pool
from ..pooling.registry import find_pool
from ..show import aligned, progress
from ..training.columns import column_prompts, count
from ..training.data import load_pairs
from ..training.train import load_scored
from .config import Candidate, FitConfig, read_fit_config
from .states import ROOM, KeptStates, Text, disk_need, missing, plan_of, take_states
from .trials import DevSet, Trial, try_pool

RESULTS, TRIALS, TRIAL = "fit.json", "trials", "trial.json"
_RULE = 3  # how a trial is trained; what was trained by another rule is another trial


class Found:
    """Every trial of a fit, and the best of them.

    Attributes:
        trials: by candidate, one a seed. best: the candidate of the highest mean dev score. seed: the place among the
            seeds of its best trial.
    """

    def __init__(self, trials: Mapping[Candidate, Sequence[Trial]]) -> None:
        self.trials = trials
        whole = {c: [t.dev for t in found if t.dev is not None] for c, found in trials.items()}
        whole = {c: scores for c, scores in whole.items() if len(scores) == len(trials[c])}
        if not whole:
            raise ValueError("every candidate diverged; lower the learning rates")
        self.best = max(whole, key=lambda c: mean(whole[c]))
        self.seed = whole[self.best].index(max(whole[self.best]))

    def __str__(self) -> str:
        tested = any(trial.test is not None for found in self.trials.values() for trial in found)
        heads = ["pool", "learning rate", "dev, untrained", "dev", *["test"] * tested, "ms a step", ""]
        return aligned(heads, (self._line(candidate, tested) for candidate in self.trials), left=1)

    def _line(self, candidate: Candidate, tested: bool) -> list[str]:
        found = self.trials[candidate]
        return [
            candidate.name, f"{candidate.learning_rate:g}", f"{mean(trial.start for trial in found):.4f}",
            _spread([trial.dev for trial in found]), *[_spread([trial.test for trial in found])] * tested,
            f"{1e3 * mean(trial.seconds_a_step for trial in found):.0f}", "*" if candidate == self.best else "",
        ]  # fmt: skip


def _spread(scores: Sequence[float | None]) -> str:
    whole = [score for score in scores if score is not None]
    if len(whole) < len(scores):
        return "diverged"
    return f"{mean(whole):.4f}" + (f" ± {stdev(whole):.4f}" if len(whole) > 1 else "")


def fit(
    config: str | Path | Mapping[str, Any] | FitConfig, overrides: Sequence[str] = (), *, dry_run: bool = False
) -> Found | None:
    """Train the pools of a config on kept states of its base; the best becomes the embedder in output_dir.

    What an earlier run left is gone on from: parts of the states, and trials that are the same to the last setting.

    Args:
        config: a YAML file or its content, see `read_fit_config`. overrides: "--key value" words.
        dry_run: load and check everything, print the plan with the disk's need, and stop; returns None.

    Raises:
        ValueError: a wrong config or data (lines named), a base that is not frozen, kept states of another model or
            text, a pool that reads something else than layers or does not fit, every candidate diverged.
        OSError: the disk has no room for the states.
    """
    config = config if isinstance(config, FitConfig) else read_fit_config(config, overrides)
    output = Path(config.output_dir)
    check_folder_name(output)
    recover(output)
    pairs = load_pairs(config.data["train"], **config.pairs)
    scored = [load_scored(path) for path in (*config.dev, *config.test)]
    embedder = load(config.model, **_with_skipped(config))
    texts, table, sets = _index(embedder, pairs, scored)
    dev, test = sets[: len(config.dev)], sets[len(config.dev) :]
    folder = Path(config.states or output / "states")
    plan = plan_of(embedder, texts)
    print(_describe(config, embedder, table, plan, folder), flush=True)  # builds every pool: faults show here
    if dry_run:
        check_room(folder, disk_need(plan, sum(rows for _, rows in missing(folder, plan))), ROOM)
        return None
    states = take_states(embedder, texts, folder)
    trials = _Trials(config, embedder, states, table, dev, test, output / TRIALS)
    found = trials.run()
    print(found, flush=True)
    embedder.pooler.pool, seed = trials.pool(found.best, config.seeds[found.seed]), config.seeds[found.seed]
    embedder.eval().save(output)
    write_json(output / RESULTS, [
        {**dataclasses.asdict(c), "seed": s, **dataclasses.asdict(t)}
        for c, of_seeds in found.trials.items() for s, t in zip(config.seeds, of_seeds, strict=True)
    ])  # fmt: skip
    print(
        f"{output}: {found.best.name} at {found.best.learning_rate:g}, seed {seed}. Go on with LoRA: mlpool train … "
        f"--model {output} --lora true. {folder} ({disk_need(plan) / 1e9:.2f} GB) is no longer needed"
    )
    return found


# --- what is to be done -----------------------------------------------------------------------------------------------


def _with_skipped(config: FitConfig) -> dict[str, Any]:
    """The options of `load`, with the tokens that the candidates leave out of the means: rows are taken once."""
    skipped = {c.pooler.get("skip_tokens", 0) if isinstance(c.pooler, Mapping) else 0 for c in config.candidates}
    if len(skipped) > 1:
        raise ValueError(f"candidates have skip_tokens {sorted(skipped)}, and states are taken once; fit them apart")
    return {**config.options, **({"pooler": {"skip_tokens": skipped.pop()}} if any(skipped) else {})}


def _index(embedder: Embedder, pairs: Any, scored: Sequence[Any]) -> tuple[list[Text], NDArray[np.int64], list[DevSet]]:
    """Every text once, with its prompt; pairs [pairs, columns] and scored sets as rows of them."""
    rows: dict[Text, int] = {}

    def row(text: str, prompt: str) -> int:
        return rows.setdefault((prompt, text), len(rows))

    prompts = column_prompts(embedder.prompts, pairs.column_names)
    columns = [[row(text, prompts.get(name, "")) for text in pairs[name]] for name in pairs.column_names]
    plain = embedder.prompts.get(embedder.default_prompt_name or "") or ""  # as `encode` embeds them
    sets = [
        DevSet(
            np.array([row(a, plain) for a, _, _ in lines]),
            np.array([row(b, plain) for _, b, _ in lines]),
            [score for _, _, score in lines],
        )
        for lines in scored
    ]
    return list(rows), np.array(columns, np.int64).T, sets


def _build(embedder: Embedder, candidate: Candidate) -> Pool:
    """A new pool for the embedder's backbone."""
    backbone = embedder.backbone
    design = backbone._design
    if candidate.pool is not None:
        design = dataclasses.replace(design, pool=find_pool(candidate.pool))
    if not (design.reads_all_layers and design.trainable):
        raise ValueError(
            f"the candidate {candidate.name!r} is a {design.pool.__name__}, which has nothing to train or reads no "
            "layer_states; fit takes pools that read the rows of layers"
        )
    pool = build_pool(
        design, backbone.hidden_size, backbone.num_layers, candidate.pooler, backbone.layers, backbone.untuned
    )
    if (own := getattr(pool, "skip_tokens", 0)) != backbone.skip_tokens:
        raise ValueError(
            f"{candidate.name!r} has skip_tokens={own}, and the rows are taken with {backbone.skip_tokens}"
        )
    return pool


def _describe(
    config: FitConfig, embedder: Embedder, table: NDArray[np.int64], plan: dict[str, Any], folder: Path
) -> str:
    tried = "\n".join(
        f"            {c.name}: {sum(p.numel() for p in _build(embedder, c).parameters()) / 1e6:.2f} M parameters, "
        f"learning rate {c.learning_rate:g}"
        for c in config.candidates
    )
    design, sizes = embedder.backbone.design, f"{plan['layers']} layers of {plan['hidden_size']}"
    return (
        f"data        {count(len(table), 'pair')} in {table.shape[1]} columns, {count(plan['texts'], 'text')} in all\n"
        f"design      {design} on {config.model}, frozen; {sizes}\n"
        f"states      {disk_need(plan) / 1e9:.2f} GB in {folder}\n"
        f"candidates  {len(config.candidates)}, each with {count(len(config.seeds), 'seed')}, {config.max_steps} steps "
        f"of {config.batch_size}\n{tried}"
    )


# --- trials -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Trials:
    """All trials of a fit; what is finished lies in `folder`, by a hash of every setting."""

    config: FitConfig
    embedder: Embedder
    states: KeptStates
    pairs: NDArray[np.int64]
    dev: Sequence[DevSet]
    test: Sequence[DevSet]
    folder: Path

    def run(self) -> Found:
        c = self.config
        total = len(c.candidates) * len(c.seeds) * c.max_steps
        with progress("fit", "step", total) as bar:
            return Found({cand: [self._one(cand, seed, bar) for seed in c.seeds] for cand in c.candidates})

    def pool(self, candidate: Candidate, seed: int) -> Pool:
        """As it was trained."""
        return type(_build(self.embedder, candidate)).from_pretrained(self._place(candidate, seed))

    def _one(self, candidate: Candidate, seed: int, bar: Any) -> Trial:
        place = self._place(candidate, seed)
        if (kept := _kept(place)) is not None:
            bar.update(self.config.max_steps)
            return kept
        bar.set_postfix_str(f"{candidate.name} at {candidate.learning_rate:g}, seed {seed}")
        torch.manual_seed(seed)
        pool = _build(self.embedder, candidate)
        trial = try_pool(
            pool, self.states, self.pairs, self.dev, self.test, self.config, candidate.learning_rate, seed,
            self.embedder.device, bar,
        )  # fmt: skip
        (place / TRIAL).unlink(missing_ok=True)
        pool.save_pretrained(place)
        write_json(place / TRIAL, {"sha256": sha256(place / WEIGHTS_NAME), **dataclasses.asdict(trial)})
        return trial

    def _place(self, candidate: Candidate, seed: int) -> Path:
        c = self.config
        settings = [
            _RULE, self.embedder.backbone.untuned, candidate.pool, candidate.pooler, candidate.learning_rate, seed,
            c.batch_size, c.max_steps, c.warmup_steps, c.weight_decay, c.loss, self.states.identity, self._data,
        ]  # fmt: skip
        return self.folder / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    @functools.cached_property
    def _data(self) -> str:
        digest = hashlib.sha256(self.pairs.tobytes())
        for first, second, scores in (*self.dev, *self.test):
            digest.update(first.tobytes() + second.tobytes() + json.dumps(list(scores)).encode())
        return digest.hexdigest()


def _kept(place: Path) -> Trial | None:
    """A trial that was finished, with its pool whole."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = read_json(place / TRIAL)
        if found.pop("sha256") == sha256(place / WEIGHTS_NAME):
            return Trial(**found)
    return None
