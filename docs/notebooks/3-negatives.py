# %% [markdown]
# # Fine-tune with mined negatives
#
# SmolLM2 becomes an embedder by a few minutes of LoRA, once on pairs alone and once with a hard negative to each: a
# text that is near to the question and is not its answer. Do mined negatives help here? The task is that of
# [the second notebook](2-design.ipynb); to run this one, see [the first](1-search.ipynb).

# %%
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Image, display
from IPython.utils.capture import capture_output

sys.path.append("../../examples")
import minilm

import mlpool
from mlpool.corpus.negatives import Choice
from mlpool.evaluation.compare import compare
from mlpool.evaluation.evaluate import evaluate_local
from mlpool.training.mine import describe, mine_pairs
from mlpool.training.train import train

base = "../../bases/smollm2"
made = [sys.executable, "../../examples/python_docs.py", "-o", "runs/data"]
print(subprocess.run(made, capture_output=True, text=True, check=True).stdout)

# %% [markdown]
# ## Mine
#
# Any embedder may mine; a better one than the one that is trained finds better negatives. The margin keeps out what
# may be another right answer: a negative scores at most 95 % of its pair. As a command:
# `mlpool mine pairs.jsonl --model MODEL -o mined.jsonl -n 1 --relative-margin 0.05`.

# %%
miner = mlpool.load(minilm.folder(), design="mean-bidirectional", max_seq_length=64)
mined = "runs/mined.jsonl"
print(describe(mine_pairs("runs/data/pairs.jsonl", miner, mined, Choice(num_negatives=1, relative_margin=0.05))))
for row in [json.loads(line) for line in Path(mined).read_text().splitlines()][:4]:
    print(f"\n{row['anchor'][:100]}\n   + {row['positive'][:90]}\n   - {row['negative_1'][:90]}")

# %% [markdown]
# ## Train
#
# The same pairs, steps and seeds, with and without their negatives. To fit two cores: the first ten of 30 layers
# ([depth](../depth.md)), texts of 32 tokens, 12 steps of 16 pairs. As a command: `mlpool train train.yaml`.

# %%
config = {
    "model": base,
    "design": "multi-layer-causal-mean",
    "depth": 10,
    "max_seq_length": 32,
    "lora": {"rank": 8, "alpha": 16},
    "loss": {"temperature": 0.05},
    "per_device_train_batch_size": 16,
    "max_steps": 12,
    "learning_rate": 2e-3,
    "warmup_steps": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
seeds = (0, 1)
runs = {(count, seed): f"runs/trained-{count}-{seed}" for seed in seeds for count in (0, 1)}


for (count, seed), output in runs.items():
    data = {"train": mined, "num_negatives": count}
    with capture_output():  # the plan, and a line a step
        train({**config, "data": data, "seed": seed, "output_dir": output})
    print(f"{output}: {count} mined negatives a pair, seed {seed}")

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for (count, seed), output in runs.items():
    history = json.loads(Path(output, "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    axes.plot(range(1, len(losses) + 1), losses, color=("#0072B2", "#D55E00")[count], linestyle=("-", "--")[seed])
axes.set(xlabel="step", ylabel="loss", title="without (blue) and with a negative (red), two seeds")
plt.show()

# %% [markdown]
# The losses are not to be compared: with negatives there are 31 wrong answers to choose from, not 15, and half of them
# hard.
#
# ## Evaluate
#
# Eight sets of functions that were not trained on, two seeds of each, and the untrained model beside them.

# %%
labels = {0: "pairs alone", 1: "with negatives"}
untrained = mlpool.load(base, design="multi-layer-causal-mean", depth=10, max_seq_length=32)
evaluate_local(untrained, "runs/data", ["retrieval"], "runs/scores/untrained", label="untrained")
for (count, seed), output in runs.items():
    where = f"runs/scores/{labels[count]}"
    evaluate_local(mlpool.load(output), "runs/data", ["retrieval"], where, label=labels[count], seed=seed)
gain = compare(["runs/scores/untrained", "runs/scores/pairs alone"]).table[0]
print(f"nDCG@10 untrained {gain['baseline_score']:.3f}, trained on pairs {gain['model_score']:.3f}: {gain['verdict']}")
comparison = compare(["runs/scores/pairs alone", "runs/scores/with negatives"])
comparison.save("runs/negatives")
display(Image("runs/negatives/forest.png", width=760))
row = comparison.table[0]
print(f"with negatives {row['model_score']:.3f}: {row['difference']:+.3f}, p = {row['p']:.2g}: {row['verdict']}")
print(f"spread over seeds: {row['baseline_seed_sd']:.3f} without, {row['model_seed_sd']:.3f} with negatives")
