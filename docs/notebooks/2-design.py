# %% [markdown]
# # Choose a design for your task
#
# Three questions before any fine-tuning, one command each: which layers of a base hold what the task needs
# (`mlpool layers`), which pool reads them best (`mlpool fit`), and is the difference more than chance
# (`mlpool compare`). The base is SmolLM2, 135 million parameters; it stays frozen throughout.
#
# The task: given the first paragraph of a docstring of Python's library, find the rest of it. To run the notebook, see
# [the first](1-search.ipynb).

# %%
import subprocess
import sys

import matplotlib.pyplot as plt
from IPython.display import Image, display

import mlpool
from mlpool.analysis.inputs import read_pairs
from mlpool.analysis.layers import layer_scores
from mlpool.evaluation.compare import compare
from mlpool.evaluation.evaluate import evaluate_local
from mlpool.fitting.fit import fit

base = "../../bases/smollm2"
made = [sys.executable, "../../examples/python_docs.py", "-o", "runs/data"]
print(subprocess.run(made, capture_output=True, text=True, check=True).stdout)

# %% [markdown]
# ## Layers
#
# `mlpool layers bases/smollm2 --pairs dev.jsonl` scores every layer by itself, untrained, in one pass: Spearman's
# correlation of cosines with how well two texts belong together (own rest 2, same area 1, another area 0).

# %%
embedder = mlpool.load(base, design="mean-causal", max_seq_length=32)
scores = layer_scores(embedder, read_pairs("runs/data/dev.jsonl"))
scores.save("runs/layers")
display(Image("runs/layers/layers_score.png", width=640))
print(scores.reading())

# %% [markdown]
# Last tokens hold next to nothing of the task. Raw means break down in the middle, where a few huge numbers drown all
# others ([depth](../depth.md)). Tokens at unit length hold about as much in most layers as in the last, which is the
# one that a plain embedder reads. So there is something to gain from reading them all.

# %% tags=["claims"]
last, mean, unit = (scores.mean(pooling) for pooling in ("last", "mean", "unit_mean"))
assert last.max() < 0.2
assert mean[12:29].max() < 0.2
assert unit[1:].min() > 0.2
assert unit.argmax() != 30

# %% [markdown]
# ## Fit
#
# While the base is frozen its layers' states are always the same. `mlpool fit` takes them once and trains each pool on
# them alone, so that trying four costs little more than one.

# %%
small = {"num_latents": 32, "num_heads": 4, "head_dim": 64, "ff_mult": 1}
found = fit(
    {
        "model": base,
        "design": "multi-layer-causal-mean",
        "max_seq_length": 32,
        "data": {"train": "runs/data/pairs.jsonl", "limit": 400},
        "dev": ["runs/data/dev.jsonl"],
        "candidates": [
            {"name": "default", "pooler": small, "learning_rate": [1e-3, 5e-3]},
            {"name": "released equations", "pooler": {**small, "residual": False}, "learning_rate": 1e-3},
            {"name": "layer weights", "pool": "LayerWeightsPool", "learning_rate": 3e-2},
        ],
        "batch_size": 48,
        "max_steps": 40,
        "warmup_steps": 4,
        "output_dir": "runs/fit",
    }
)

# %%
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
names = [f"{candidate.name}, {candidate.learning_rate:g}" for candidate in found.trials]
trials = [one for (one,) in found.trials.values()]
axes.barh(names, [trial.dev for trial in trials], color="#0072B2", label="trained")
axes.plot([trial.start for trial in trials], names, "D", color="#D55E00", label="before")
axes.set(xlabel="dev, Spearman")
axes.invert_yaxis()
axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(1, 0))
plt.show()

# %% tags=["claims"]
*pools, weights = (trial.dev for trial in trials)
assert min(pools) > weights + 0.1
assert trials[0].start > weights
assert min(pools) > max(values.max() for values in (last, mean, unit)) + 0.1

# %% [markdown]
# The default begins where the others end up later or never: it whitens the mix of all layers by the training texts,
# before the first step ([pools](../pools.md)). The trained pools are far above any layer by itself, and above one
# weight a layer. Which of the pools is the best, dev
# data of 64 functions and one seed cannot say; more seeds would help (`seeds: 3`). Milliseconds a step are those of a
# machine that did much else at the time.
#
# ## Compare
#
# Dev data chose the pool, so they cannot say how good it is. Eight test sets can: functions of eight areas, none of
# them seen above.

# %%
for label, model in (("mean of the last layer", embedder), ("fitted pool", mlpool.load("runs/fit"))):
    evaluate_local(model, "runs/data", ["retrieval"], f"runs/results/{label}", label=label)
comparison = compare(["runs/results/mean of the last layer", "runs/results/fitted pool"])
comparison.save("runs/comparison")
display(Image("runs/comparison/forest.png", width=760))
row = comparison.table[0]
print(f"nDCG@10, mean of {row['n']} sets: {row['baseline_score']:.3f} for the mean of the last layer, ", end="")
print(f"{row['model_score']:.3f} for the pool; p = {row['p']:.2g}: {row['verdict']}")

# %% [markdown]
# A data set is one observation here, so eight of them, not 178 queries, carry the verdict; with five no result could
# be shown at all ([evaluation](../evaluation.md)). Next: [fine-tune the model itself](3-negatives.ipynb).

# %% tags=["claims"]
assert row["verdict"] == "higher", row
