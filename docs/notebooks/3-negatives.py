# %% [markdown]
# # Fine-tune with mined negatives
#
# SmolLM2 is trained by twelve steps of LoRA, once on pairs alone and once with a hard negative to each: a text that is
# near to the question and is not its answer. Do mined negatives help here, and do twelve steps? The task is that of
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
# The same pairs, steps and seed, without and with their negatives. To fit two cores: the first ten of 30 layers
# ([depth](../depth.md)), texts of 32 tokens, 12 steps of 16 pairs. As a command: `mlpool train train.yaml`, with
# `--resume` to keep what is finished when the notebook is run again.

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
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 0,
}
runs = {"pairs alone": 0, "with negatives": 1}
for name, count in runs.items():
    with capture_output():  # the plan, and a line a step
        train({**config, "data": {"train": mined, "num_negatives": count}, "output_dir": f"runs/{name}"}, resume=True)

figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
for name in runs:
    history = json.loads(Path(f"runs/{name}/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    axes.plot(range(1, len(losses) + 1), losses, marker="o", markersize=3, label=name)
axes.set(xlabel="step", ylabel="loss")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The two losses do not compare: with negatives there are 31 wrong answers to choose from, not 15, and one of them is
# hard.
#
# ## Evaluate
#
# Eight sets of functions that were not trained on. Beside the two stand the model as it is and what the trainings began
# with: the same model, calibrated by the texts of the pairs, as `mlpool train` does before its first step.

# %%
models = {"untrained": mlpool.load(base, design="multi-layer-causal-mean", depth=10, max_seq_length=32)}
models["calibrated"] = mlpool.load(base, design="multi-layer-causal-mean", depth=10, max_seq_length=32)
pairs = [json.loads(line) for line in Path("runs/data/pairs.jsonl").read_text().splitlines()]
models["calibrated"].calibrate([text for pair in pairs for text in pair.values()])
models |= {name: mlpool.load(f"runs/{name}") for name in runs}
for name, model in models.items():
    evaluate_local(model, "runs/data", ["retrieval"], f"runs/scores/{name}", label=name)


def against(baseline: str, name: str):
    comparison = compare([f"runs/scores/{baseline}", f"runs/scores/{name}"])
    row = comparison.table[0]
    print(f"{name} {row['model_score']:.3f}, {baseline} {row['baseline_score']:.3f}: ", end="")
    print(f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], p = {row['p']:.2g}, {row['verdict']}")
    return comparison


start = against("untrained", "calibrated")
gain = against("calibrated", "pairs alone")
effect = against("pairs alone", "with negatives")
effect.save("runs/negatives")
display(Image("runs/negatives/forest.png", width=760))

# %% [markdown]
# What makes an embedder of it is the calibration, before any step and without a label: all eight sets gain. What the
# twelve steps add to that, and what mined negatives add to those, is within noise, and the intervals say how much that
# leaves open. That is about twelve steps and these models: forty steps of 24 pairs add ([designs](../designs.md)), and
# whether mining helps on your data takes your data, more steps and several seeds (`--seed`, [mining](../mining.md)).

# %% tags=["claims"]
first, steps, mining = (comparison.table[0] for comparison in (start, gain, effect))
assert first["wins"] == 8, first
assert first["verdict"] == "higher", first
assert first["difference"] > 0.2, first
assert abs(steps["difference"]) < 0.06, steps
assert abs(mining["difference"]) < 0.06, mining
