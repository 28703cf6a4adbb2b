"""The end-to-end benchmarks at toy size: all measure the same, a red gate shows no speed, and a kill loses nothing."""

from __future__ import annotations

import csv
import functools
import importlib
import json
import multiprocessing
import signal
import subprocess
import sys
import time
import types
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mlpool_kernels import reference

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
ONE = ("--preset", "tiny", "--pooler", "default", "--design", "multi-layer-bidirectional", "--device", "cpu")
ONE += ("--threads", "1")
SMALL = ("--layers", "1", "--batch-size", "2", "--max-tokens", "8", "--mode", "forward", "--device", "cpu")
SMALL += ("--threads", "1", "--data", "none")
PROVIDERS = ["eager", "sentence-transformers", "mlpool"]
ALWAYS = {
    "case", "mode", "design", "pooler", "provider", "batch", "texts", "tokens", "dtype", "error", "limit", "green",
    "execution", "p20_ms", "median_ms", "p80_ms", "texts_per_s", "extra_mib", "ratio_eager", "device", "threads",
    "torch", "transformers", "sentence_transformers", "mlpool", "commit", "code", "tiles", "part",
}  # fmt: skip


@pytest.fixture
def benchmarks(monkeypatch):
    """The benchmarks' folder on the path, as when one of them is run; one call of everything is timed (of tuning
    two), and the rate of the machine is not.
    """
    monkeypatch.syspath_prepend(str(FOLDER))
    import attention
    import encode
    import throughput
    import train_step
    import tune

    rounds = throughput.rounds
    monkeypatch.setattr(throughput, "rounds", lambda runs, clock, *_: rounds(runs, clock, 0.0, 1, False))
    for module, rate in ((throughput, "product_rate"), (throughput, "copy_rate"), (attention, "product_rate")):
        monkeypatch.setattr(module, rate, lambda *_: 1e11)
    for module in (encode, train_step):
        monkeypatch.setattr(module, "BUDGET", ((0.0, 1, 0.0),) * 3)
    monkeypatch.setattr(attention, "BUDGET", (0.0, 0.0))
    monkeypatch.setattr(tune, "REPEATS", 2)


def rows_of(folder: Path, pattern: str = "*.csv") -> list[dict[str, str]]:
    (path,) = folder.glob(pattern)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_encode_measures_three_equal_providers(benchmarks, tmp_path, capsys):
    import encode
    import summary

    assert encode.main([*ONE, "--lengths", "mixed", "--results", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert [row["provider"] for row in rows] == PROVIDERS
    assert [row["execution"] for row in rows] == ["padded", "padded", "packed"]
    assert ALWAYS | {"ratio_st", "lengths", "tokens_per_s"} <= rows[0].keys()
    assert all(row["green"] == "True" and float(row["median_ms"]) > 0 for row in rows)
    assert 0 < float(rows[2]["error"]) < 1e-5
    assert float(rows[2]["ratio_eager"]) == pytest.approx(
        float(rows[0]["median_ms"]) / float(rows[2]["median_ms"]), rel=1e-4
    )
    capsys.readouterr()
    assert summary.main([str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "vs ST" in page
    assert "No GPU has measured anything" in page
    assert (tmp_path / "summary.md").read_text() == page


def test_a_padded_encode_of_ours_says_so(benchmarks, tmp_path, monkeypatch):
    import encode

    from mlpool.embedder.backbone import Backbone

    monkeypatch.setattr(Backbone, "_pack", lambda self: None)
    assert encode.main([*ONE, "--lengths", "24", "--results", str(tmp_path)]) == 0
    assert rows_of(tmp_path)[2]["execution"] == "padded"


def test_stronger_peers_are_checked_and_say_what_they_lack(benchmarks, tmp_path, monkeypatch):
    import encode

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # for its time
    torch._dynamo.utils.counters.clear()
    options = ["--lengths", "24", "--provider", "compiled", "--provider", "sentence-transformers fp16"]
    assert encode.main([*ONE, *options, "--results", str(tmp_path)]) == 0
    rows = {row["provider"]: row for row in rows_of(tmp_path)}
    assert list(rows) == ["eager", "compiled", "sentence-transformers", "sentence-transformers fp16", "mlpool"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert float(rows["compiled"]["error"]) < 1e-5
    half = rows["sentence-transformers fp16"]
    assert 1e-5 < float(half["error"]) <= float(half["limit"])
    assert half["execution"] == "padded"
    assert "flash" in half["note"]
    assert float(rows["mlpool"]["ratio_compiled"]) > 0
    assert float(rows["mlpool"]["ratio_st_fp16"]) > 0


def test_what_cannot_be_compiled_is_a_row_that_says_why(benchmarks, tmp_path, monkeypatch):
    import encode

    def broken(eager):
        model = encode.build(eager[0], "multi-layer-bidirectional", "default")["eager"]
        monkeypatch.setattr(model, "encode", lambda *_, **__: 1 / 0)
        return model

    monkeypatch.setattr(encode, "compiled", broken)
    assert encode.main([*ONE, "--lengths", "24", "--provider", "compiled", "--results", str(tmp_path)]) == 0
    row = rows_of(tmp_path)[1]
    assert row["provider"] == "compiled"
    assert row["median_ms"] == ""
    assert row["note"] == "not compiled: division by zero"


def test_a_wrong_embedding_has_no_speed(benchmarks, tmp_path, monkeypatch, capsys):
    import encode

    right = reference.multi_layer_pool
    monkeypatch.setattr(reference, "multi_layer_pool", lambda *args: right(*args) * (1 + 2e-5))
    assert encode.main([*ONE, "--lengths", "24", "--results", str(tmp_path)]) == 1
    row = rows_of(tmp_path)[2]
    assert row["provider"] == "mlpool"
    assert row["green"] == "False"
    assert row["median_ms"] == ""
    assert "WRONG: tiny multi-layer-bidirectional default 24 mlpool" in capsys.readouterr().out


def test_providers_that_see_other_tokens_are_refused(benchmarks):
    from pipelines import EAGER, PEER, build, check_tokens, random_base, texts_of

    base = random_base("tiny", torch.device("cpu"), torch.float32)
    providers = build(base, "multi-layer-causal", "default")
    weights = [{id(p) for p in providers[name][0].parameters()} for name in PROVIDERS]
    assert weights[0] == weights[1] == weights[2]
    texts = texts_of([7, 12])
    assert check_tokens(providers, texts) == [7, 12]
    providers[PEER][0].max_seq_length = 9
    with pytest.raises(RuntimeError, match="same tokens"):
        check_tokens({name: providers[name] for name in (EAGER, PEER)}, texts)


def test_a_real_model_is_compared_without_its_chat_template_and_with_eos(benchmarks, tmp_path):
    """sentence-transformers wraps each text in the template without a word, and a decoder's tokenizer adds no EOS."""
    from pipelines import _INPUTS, OURS, SIZES, VOCABULARY, build, check_tokens, loaded_base, word_tokenizer
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model("mistral", vocab_size=VOCABULARY, **SIZES["tiny"].config)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.chat_template = "{% for message in messages %}w7 w8 {{ message['content'] }} w9 {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    loaded = loaded_base(str(tmp_path), torch.device("cpu"), torch.float32)
    features = loaded.preprocess(["w5 w6", "w5"])
    ids, mask = (features[name] for name in _INPUTS)
    assert ids[mask.bool()].tolist() == [5, 6, 1, 5, 1]
    providers = build(loaded, "multi-layer-bidirectional", "default")
    assert check_tokens(providers, ["w5 w6", "w5"]) == [3, 2]
    providers[OURS].encode("w5 w6")


def test_designs_are_timed_beside_mean_pooling(benchmarks, tmp_path, capsys):
    import designs

    rows = [{"query": f"what is {i}", "positive": f"it is layer {i}"} for i in range(4)]
    path = tmp_path / "pairs/squad_sentences/train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--base", tiny.base("llama"), "--name", "tiny", "--data", tmp_path, "--results", tmp_path / "costs.csv"]
    asked = ["eos-causal", designs.RELEASED]
    for design in asked:  # the second call keeps what the first has measured
        designs.main([*map(str, words), "--texts", "4", "--pairs", "2", "--rounds", "1", "--design", design])
    with (tmp_path / "costs.csv").open() as file:
        found = {row["design"]: row for row in csv.DictReader(file)}
    assert list(found) == ["mean-causal", *asked]
    assert all(float(row["encode_texts_per_s"]) > 0 < float(row["train_texts_per_s"]) for row in found.values())
    sizes = [int(row["parameters"]) for row in found.values()]
    assert sizes[0] == sizes[1] < sizes[2]  # a pool counts, an adapter does not
    assert "mean-causal" in capsys.readouterr().out


@pytest.mark.parametrize("gradients", ["right", "wrong"])
def test_train_step_compares_losses_and_gradients(benchmarks, tmp_path, monkeypatch, gradients):
    import train_step

    if gradients == "wrong":
        right = reference.multi_layer_pool

        def halved(*args):
            embedding = right(*args)
            return (embedding + embedding.detach()) / 2

        monkeypatch.setattr(reference, "multi_layer_pool", halved)
    wrong = gradients == "wrong"
    assert train_step.main([*ONE, "--tuning", "lora", "--results", str(tmp_path)]) == int(wrong)
    rows = rows_of(tmp_path)
    assert ALWAYS | {"tuning", "gradient_error", "gradient_limit", "mini_batch_tokens", "loss"} <= rows[0].keys()
    first = {row["provider"]: row for row in rows if row["batch"] == "2"}
    assert list(first) == [*PROVIDERS, "mlpool cached"]
    for name in ("mlpool", "mlpool cached"):
        assert float(first[name]["error"]) < 1e-5
        assert float(first[name]["gradient_error"]) == pytest.approx(1.0 if wrong else 0.0, abs=1e-4)
        assert (first[name]["median_ms"] == "") == wrong
    if not wrong:
        larger = {row["provider"]: row for row in rows if row["batch"] == "8"}
        assert float(larger["mlpool cached"]["error"]) < 1e-5
        assert float(larger["mlpool cached"]["memory_share"]) > 0


@pytest.mark.parametrize("losses", ["right", "wrong"])
def test_train_peers_trains_alike_or_shows_no_speed(benchmarks, tmp_path, monkeypatch, losses):
    """The same losses at every step, each provider from weights of its own that move; a wrong one has no speed."""
    import train_peers

    folder = tmp_path / "data/pairs/medquad"
    folder.mkdir(parents=True)
    rows = [{"query": f"q {i}", "positive": " ".join(f"{i} word" for _ in range(20 + i))} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if losses == "wrong":
        right = train_peers.Providers.backward
        halved = {"mlpool mean": 0.5}
        monkeypatch.setattr(
            train_peers.Providers,
            "backward",
            lambda self, name, columns: right(self, name, columns) * halved.get(name, 1),
        )
    wrong = losses == "wrong"
    arguments = ["--quick", "--preset", "tiny", "--lengths", "pairs", "--steps", "2", "--device", "cpu"]
    arguments += ["--threads", "1", "--data", str(tmp_path / "data"), "--results", str(tmp_path)]
    assert train_peers.main(arguments) == int(wrong)
    found = {row["provider"]: row for row in rows_of(tmp_path)}
    assert list(found) == [name for group in train_peers.ALIKE for name in group]
    for name, row in found.items():
        red = wrong and name == "mlpool mean"
        assert (row["green"], row["median_ms"] == "") == (str(not red), red)
        first, second = map(float, row["losses"].split())
        assert first != second
        if not wrong:
            assert float(row["error"]) <= 1e-5
            assert float(row["curve_error"]) <= 1e-3
            assert float(row["extra_mib"]) > 0
            assert float(row["cpu_ms"]) > 0
    assert list(tmp_path.glob("*.png"))


def test_a_batch_is_compared_with_eagers_largest_up_to_it(benchmarks):
    from train_step import compare

    def row(provider: str, batch: int, mib: float) -> dict:
        return {"provider": provider, "batch": batch, "median_ms": 1.0, "texts_per_s": float(batch), "extra_mib": mib}

    known = [row("eager", 1, 60.0), row("eager", 2, 100.0)]
    fits = [row("sentence-transformers", 8, 99.0), row("mlpool", 8, 130.0), row("mlpool cached", 8, 99.0)]
    compare(fits, known, wanted=True)
    assert [r["batch_ratio"] for r in fits] == [4.0, 4.0, 4.0]
    assert [r["target_met"] for r in fits] == [None, None, True]
    assert [r["ratio_eager"] for r in fits] == [4.0, 4.0, 4.0]
    assert "does not fit" in fits[1]["target"]
    misses = [row("mlpool cached", 8, 101.0)]
    compare(misses, known, wanted=True)
    assert misses[0]["target_met"] is False
    beside = [row("eager", 4, 300.0), row("mlpool", 4, 150.0)]
    compare(beside, known, wanted=True)
    assert beside[1]["memory_share"] == 0.5
    assert beside[1]["ratio_eager"] == 1.0
    alone = [row("mlpool", 4, 150.0)]
    compare(alone, [], wanted=True)
    assert alone[0]["target_met"] is None


# --- a kill, and the run taken up -------------------------------------------------------------------------------------

# The providers, or kernels, of the whole table, in order.
POOL = ("--quick", "--preset", "default-pool", "--mode", "forward+backward", "--mode", "step", "--device", "cpu")
CUT = {
    "encode": ([*ONE, "--lengths", "24", "--lengths", "mixed"], PROVIDERS * 2),
    "train_step": ([*ONE, "--tuning", "lora"], [*PROVIDERS, "mlpool cached", *PROVIDERS[1:], "mlpool cached"]),
    "attention": ([*SMALL], ["eager", "sdpa", "packed"] * 2),
    "throughput": ([*POOL, "--threads", "1"], ["eager", "mlpool"] * 2),
    "tune": (["--device", "cpu", "--threads", "1"], ["launch", "copy", *["product"] * 5]),
}


@pytest.mark.parametrize("name", CUT)
def test_rows_survive_a_kill_and_the_run_goes_on(benchmarks, tmp_path, name):
    arguments, expected = CUT[name]
    arguments = [*arguments, "--results", str(tmp_path)]
    cut_when(tmp_path, name, arguments)
    before = rows_of(tmp_path)
    assert 0 < len(before) < len(expected)
    assert __import__(name).main(arguments) == 0
    after = rows_of(tmp_path)
    assert [row.get("provider") or row["kernel"] for row in after] == expected
    assert all(row.get("median_ms") or row["median_us"] for row in after)
    kept = [{name: row[name] for name in before[0]} for row in after[: len(before)]]
    assert kept == before  # not measured again
    if name == "train_step":  # compared with eager's row of the run that was killed
        assert all(row["ratio_eager"] for row in after)


def cut_when(folder: Path, name: str, arguments: list[str]) -> None:
    """Run a benchmark in a fork of this process, which has imported everything; kill it once it has written rows."""
    import rows

    add = rows.Rows.add

    def add_and_wait(self: Any, *group: Any) -> None:
        add(self, *group)
        signal.pause()

    def run() -> None:
        torch.set_num_threads(1)  # threads do not live through a fork
        rows.Rows.add = add_and_wait
        with (folder / "output.txt").open("w") as output, redirect_stdout(output), redirect_stderr(output):
            __import__(name).main(arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    while process.is_alive():
        with suppress(ValueError, FileNotFoundError):
            if rows_of(folder):
                process.kill()
                break
        time.sleep(0.01)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (folder / "output.txt").read_text()


# --- without a card ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
@pytest.mark.parametrize("name", ["encode", "train_step", "attention", "gpu_tests", "throughput", "tune"])
def test_without_a_card_a_step_says_so_in_one_line(benchmarks, tmp_path, name):
    with pytest.raises(SystemExit) as ended:
        __import__(name).main(["--device", "cuda", "--results", str(tmp_path)])
    assert "there is no CUDA GPU" in str(ended.value)
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--preset", "gpt-5"], "qwen2-0.5b"), (["--lengths", "17"], "no case is left; there are: qwen2-0.5b")],
)
def test_an_unknown_preset_or_length_names_the_known_ones(benchmarks, tmp_path, capsys, arguments, said):
    import encode

    with pytest.raises(SystemExit) as ended:
        encode.main([*arguments, "--device", "cpu", "--results", str(tmp_path)])
    assert said in str(ended.value) + capsys.readouterr().err


def test_an_old_package_ends_a_step_in_one_line(benchmarks, monkeypatch):
    """As `mlpool.embedder` refuses it."""
    monkeypatch.delitem(sys.modules, "pipelines")
    monkeypatch.setitem(sys.modules, "mlpool.embedder", types.ModuleType("mlpool.embedder"))
    with pytest.raises(SystemExit, match="this benchmark cannot run: cannot import name 'DESIGNS'"):
        importlib.import_module("pipelines")


def test_an_unknown_step_names_the_known_ones():
    done = subprocess.run(["make", "gpu-fly"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "there is no step gpu-fly; the steps are gpu-check gpu-test gpu-tune" in done.stderr


def test_make_gpu_runs_every_step_and_fails_if_one_failed():
    """PY=false makes every step fail."""
    done = subprocess.run(["make", "gpu", "PY=false"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout.count("false benchmarks/") == 10
    names = ["check", "test", "tune", "throughput", "choices", "encode", "train", "attention", "contrast", "summary"]
    assert f"not done: {' '.join(f'gpu-{name}' for name in names)}" in done.stderr
    assert subprocess.run(["make", "gpu", "PY=true"], cwd=ROOT, capture_output=True).returncode == 0


def test_contrast_compares_losses_and_gradients(benchmarks, tmp_path, monkeypatch, capsys):
    """At toy size; a wrong loss has no speed."""
    import contrast
    import summary

    monkeypatch.setattr(contrast, "BUDGET", {"cpu": 0.0})
    monkeypatch.setattr(contrast, "HIDDEN", 64)
    one = ["--sizes", "48x96", "--device", "cpu", "--threads", "1", "--results"]
    assert contrast.main([*one, str(tmp_path / "right"), "--kind", "prefixes"]) == 0
    rows = rows_of(tmp_path / "right")
    assert len(rows) == 3 * len(contrast.MODES)
    ours = [row for row in rows if row["provider"] == "mlpool"]
    assert all(float(row["error"]) < 1e-6 and float(row["median_ms"]) > 0 for row in ours)
    assert all(float(row["gradient_error"]) < 2e-6 for row in ours if row["mode"] != "forward")
    capsys.readouterr()
    assert summary.main([str(tmp_path / "right")]) == 0
    assert "48x96 prefixes forward+backward" in capsys.readouterr().out
    right = contrast.contrast
    monkeypatch.setattr(contrast, "contrast", lambda *args, **options: 1.001 * right(*args, **options))
    assert contrast.main([*one, str(tmp_path / "wrong"), "--kind", "masks", "--mode", "forward"]) == 1
    assert all(row["median_ms"] == "" for row in rows_of(tmp_path / "wrong") if row["provider"] == "mlpool")
    assert "WRONG: 48x96 masks forward mlpool" in capsys.readouterr().out
