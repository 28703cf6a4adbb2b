# %% [markdown]
# # Serve with vLLM
#
# vLLM serves embeddings of a model's last layer. With mlpool installed beside it, it serves every design, pools over
# all layers too: exported once, started, asked by HTTP, and compared with `encode`.
#
# To run it: `pip install -c constraints.txt -e '.[notebooks,vllm]'` and `make bases/smollm2` in a checkout, then open
# it in `docs/notebooks`. Here vLLM is its CPU build.

# %%
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from openai import OpenAI

import mlpool
from mlpool.exchange.export import export

# %% [markdown]
# ## Export
#
# Any embedder of a family that the plugin knows; a fine-tuned one is merged first. Here it is SmolLM2, untrained, with
# a pool over its first ten layers. As a command: `mlpool export FOLDER -o served --to vllm`.

# %%
embedder = mlpool.load("../../bases/smollm2", design="multi-layer-causal-mean", depth=10, max_seq_length=128)
shutil.rmtree("runs/served", ignore_errors=True)
print("loaded again, embeddings agree to", export(embedder, "runs/served", "vllm"))
print(*sorted(path.name for path in Path("runs/served").iterdir()), sep="  ")

# %% [markdown]
# ## Start
#
# In a shell: `vllm serve served --runner pooling`; of the CPU build, whose command does not start, the same by its
# module. The other options are for a CPU: float32, so that the comparison is of the pool and not of rounding, nothing
# compiled, and 1 GiB for a cache of which embeddings need little.

# %%
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
python = Path(shutil.which("vllm")).with_name("python")  # vLLM may have an environment of its own
command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", "runs/served", "--served-model-name", "mine"]
command += ["--runner", "pooling", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", port]
environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
environment["VLLM_NO_USAGE_STATS"] = "1"
with Path("runs/server.log").open("w") as log:
    server = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )  # fmt: skip
address = f"http://127.0.0.1:{port}"


def ready() -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health").status == 200
    except OSError:
        return False


while not ready():
    if server.poll() is not None:
        raise SystemExit(Path("runs/server.log").read_text()[-3000:])
    time.sleep(1)
print("the server answers")

# %% [markdown]
# ## Ask
#
# By HTTP, as any program can:

# %%
texts = [
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "The chef cooks pasta in the kitchen.",
    "A cook prepares noodles.",
    "The stock market fell sharply today.",
    "Shares lost much of their value.",
]
body = json.dumps({"model": "mine", "input": texts}).encode()
request = urllib.request.Request(f"{address}/v1/embeddings", body, {"Content-Type": "application/json"})
answer = json.load(urllib.request.urlopen(request))
print(answer["model"], answer["usage"])
by_http = np.array([entry["embedding"] for entry in answer["data"]])

# %% [markdown]
# By OpenAI's client, which asks for the same in base64:

# %%
client = OpenAI(base_url=f"{address}/v1", api_key="none")
answer = client.embeddings.create(model="mine", input=texts)
by_client = np.array([entry.embedding for entry in answer.data])
print(by_client.shape, "off HTTP by at most", np.abs(by_client - by_http).max())

# %% [markdown]
# ## Compare
#
# The same embedder in Python: coordinate by coordinate within rounding of float32. (That all texts are alike, the two
# of each pair a little more, is how an untrained model embeds.)

# %%
ours = embedder.encode(texts)
off = np.abs(by_http - ours)
print(f"server and encode differ by at most {off.max():.1e}, cosines are above {(by_http * ours).sum(1).min():.7f}")
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=(1, 1.3))
image = left.imshow(by_http @ by_http.T, cmap="viridis")
left.set(title="cosines, served", xticks=range(6), yticks=range(6))
figure.colorbar(image, ax=left)
right.plot(ours.ravel(), by_http.ravel(), ".", markersize=2)
right.set(title="every coordinate", xlabel="encode", ylabel="server")
plt.show()

# %% tags=["claims"]
assert off.max() < 1e-5, off.max()
assert np.abs(by_client - by_http).max() < 1e-6

# %% [markdown]
# ## Stop
#
# With its worker, which is a process of its own.

# %%
os.killpg(server.pid, signal.SIGTERM)
print("ended with", server.wait(timeout=60))

# %% [markdown]
# What can be served, and what a server is told otherwise: [serving](../serving.md).
