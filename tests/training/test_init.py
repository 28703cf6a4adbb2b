"""`mlpool init`: what it writes is what `mlpool train` runs, and each value is that of the base and the data."""

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("datasets")

from tiny import D, base, embedder

from mlpool import cli
from mlpool.training import init
from mlpool.training.init import Base, Data, Machine
from mlpool.training.prompts import fitting_prompts, language
from mlpool.training.train import train

ENGLISH = [
    (
        f"what is number {i} of the list?",
        f"It is the number {i} which comes after {i - 1} in the list of numbers, as it was for all of the others.",
    )
    for i in range(60)
]
GERMAN = [
    (
        f"Was ist die Zahl {i} in der Liste?",
        f"Das ist die Zahl {i}, die auf {i - 1} folgt, wie es bei den anderen auch ist, und sie ist nicht die letzte.",
    )
    for i in range(60)
]
ALIKE = [(f"a man plays the guitar {i} times", f"the man is playing a guitar {i} times") for i in range(60)]


def write(path: Path, pairs, names=("query", "positive")) -> Path:
    path.write_text("".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs))
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(model, data, *more) -> tuple[dict, str]:
    assert cli.main(["init", str(model), str(data), "-o", "train.yaml", *more]) == 0
    text = Path("train.yaml").read_text()
    return yaml.safe_load(text), text


@pytest.mark.parametrize(
    ("family", "pairs", "design", "prompt"),
    [
        ("qwen2", GERMAN, "multi-layer-causal-mean", "Instruct: Finde zu einer Frage"),
        ("bert", ENGLISH, "multi-layer-bidirectional", "Instruct: Given a question"),
        ("bert", ALIKE, "multi-layer-bidirectional", None),
    ],
)
def test_what_it_writes_is_what_train_runs(family, pairs, design, prompt, capsys):
    data = write(Path("pairs.jsonl"), pairs)
    values, text = made(base(family), data)
    assert values["design"] == design
    assert values.get("prompts", {"query": None})["query"] is prompt or values["prompts"]["query"].startswith(prompt)
    assert values["data"] == {"train": "pairs.jsonl"}
    assert "60 pairs of 60 rows (anchor = query, positive = positive)" in text
    # A reason stands above each value that was chosen.
    lines = text.splitlines()
    for key in ("design", "max_seq_length", "loss", "per_device_train_batch_size", "learning_rate", "warmup_steps"):
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert lines[at - 1].startswith("# "), key
    capsys.readouterr()
    made_embedder = train("train.yaml", dry_run=True)
    plan = capsys.readouterr().out
    assert made_embedder[0].design == design
    # The length holds what it says: nearly nothing is cut, prompt and EOS counted.
    assert made_embedder[0].max_seq_length == values["max_seq_length"]
    assert f"batch       {values['per_device_train_batch_size']} =" in plan
    assert not Path(values["output_dir"]).exists()


def test_a_saved_embedder_and_a_sentence_transformers_model(tmp_path, capsys):
    data = write(Path("pairs.jsonl"), ENGLISH)
    embedder("mean-bidirectional", "bert").save(str(tmp_path / "saved"))
    assert cli.main(["init", "saved", str(data), "-o", "x.yaml"]) == 2
    assert "is an embedder of mlpool already" in capsys.readouterr().err
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    SentenceTransformer(modules=[Transformer(str(base("bert"))), Pooling(D)]).save("st")
    values, text = made("st", data)
    assert values["design"] == "mean-bidirectional"
    assert "prompts" not in values
    assert "# prompts: none: the base was trained for embeddings" in text


def fails(capsys, *words) -> str:
    assert cli.main(["init", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("mlpool: error: ")
    assert not Path("x.yaml").exists()
    return message


def test_bad_input(tmp_path, capsys):
    good, model = write(Path("pairs.jsonl"), ENGLISH), base("bert")
    assert "there is no file none.jsonl" in fails(capsys, model, "none.jsonl", "-o", "x.yaml")
    assert "near it: pairs.jsonl" in fails(capsys, model, "pair.jsonl", "-o", "x.yaml")
    columns = write(Path("other.jsonl"), ENGLISH, ("left", "right"))
    message = fails(capsys, model, columns, "-o", "x.yaml")
    assert "no known columns. Found: 'left', 'right'" in message
    rows = write(Path("rows.jsonl"), [*ENGLISH, ("", "b")])
    assert "rows.jsonl:61" in fails(capsys, model, rows, "-o", "x.yaml")
    (tmp_path / "empty").mkdir()
    assert "holds no model" in fails(capsys, "./empty", good, "-o", "x.yaml")
    (tmp_path / "empty/config.json").write_text((model / "config.json").read_text())
    assert "has a config and no weights" in fails(capsys, "./empty", good, "-o", "x.yaml")
    assert "a config's name ends in .yaml" in fails(capsys, model, good, "-o", "x.json")


def test_a_config_that_is_there_is_kept(capsys):
    data = write(Path("pairs.jsonl"), ENGLISH)
    Path("train.yaml").write_text("mine")
    assert "pass --overwrite" in fails(capsys, base("bert"), data, "-o", "train.yaml")
    assert Path("train.yaml").read_text() == "mine"
    assert made(base("bert"), data, "--overwrite")[0]["model"] == str(base("bert"))


# --- decisions, by what was looked at ---------------------------------------------------------------------------------


def decoder(parameters: int, **changes) -> Base:
    return Base(parameters, 30, 576, 1536, False, False, 8192, None)._replace(**changes)


def data(pairs: int, length: int = 60) -> Data:
    return Data(pairs, [], 1, {"anchor": (12, 20), "positive": (length, 900)}, {}, "")


CPU, CARD = Machine("cpu", 8 << 30, False), Machine("cuda", 80 << 30, True)


def test_design_by_base_and_steps():
    assert init.pick_design(decoder(10**8), 5000)[0] == "multi-layer-bidirectional"
    assert init.pick_design(decoder(10**8), 50)[0] == "multi-layer-causal-mean"
    assert init.pick_design(decoder(10**8, tuned=True), 50)[0] == "eos-causal"
    assert init.pick_design(decoder(10**8, tuned=True, encoder=True), 50)[0] == "mean-bidirectional"


def test_length_holds_95_percent_within_the_limit():
    assert init.pick_length(decoder(1), data(10, 61))[0] == 64
    assert init.pick_length(decoder(1, limit=48), data(10, 61))[0] == 48
    near = data(10)._replace(lengths={"anchor": (12, 70), "positive": (61, 76)})
    assert init.pick_length(decoder(1), near)[0] == 80, "nothing is cut for five tokens more"


def test_lora_for_raw_decoders_and_where_all_weights_do_not_fit():
    assert init.pick_lora(decoder(135_000_000), CPU)[0]
    tuned = decoder(135_000_000, tuned=True)
    assert not init.pick_lora(tuned, CPU)[0]  # 2.2 of 8 GiB
    assert not init.pick_lora(tuned._replace(encoder=True), CPU)[0]
    assert init.pick_lora(tuned._replace(parameters=600_000_000), CPU)[0]
    assert not init.pick_lora(tuned._replace(parameters=600_000_000), CARD)[0]
    assert init.pick_lora(tuned._replace(parameters=7_000_000_000), CARD)[0]


def test_rates_of_lora_and_of_all_weights():
    rates = [init.pick_rate(decoder(size), lora)[0]
             for size, lora in ((135_000_000, True), (7_000_000_000, True), (135_000_000, False))]  # fmt: skip
    assert rates == [1e-3, 1e-4, 2e-5]
    assert init.pick_rate(decoder(135_000_000, tuned=True), True)[0] == 1e-4


def test_batches_grow_with_data_and_machine():
    sizes = [init.pick_batch(decoder(10**8), data(pairs), machine)[0]
             for pairs, machine in ((3, CPU), (100, CPU), (10**6, CPU), (10**6, CARD))]  # fmt: skip
    assert sizes == [2, 4, 32, 256]


def test_mini_batches_fit_the_memory():
    for machine in (CPU, CARD, CPU._replace(free=1 << 28)):
        base = decoder(135_000_000)
        tokens, _ = init.pick_mini_batch(base, machine, False, 64)
        assert init.LEAST_TOKENS <= tokens <= init.MOST_TOKENS
        assert tokens & (tokens - 1) == 0
        if tokens > init.LEAST_TOKENS:
            assert tokens * init.token_bytes(base, machine) <= machine.free / 4
    assert init.pick_mini_batch(decoder(1), CPU._replace(free=0), True, 5000)[0] == 8192  # a text must fit


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("the cat is in the house and it was what they wanted", "English"),
        ("die Katze ist nicht in dem Haus und der Hund auch", "German"),
        ("le chat est dans la maison et les chiens ne sont pas là", "French"),
        ("el gato que es de la casa y los perros no", "Spanish"),
        ("il gatto che è nella casa e i cani non sono della città", "Italian"),
        ("o gato não é uma coisa que os cães da casa do homem", "Portuguese"),
        ("de kat is niet in het huis en een hond van die man", "Dutch"),
        ("猫は家の中にいます", "Japanese"),
        ("고양이는 집에 있다", "Korean"),
        ("猫在房子里", "Chinese"),
        ("кошка сидит в доме", "Russian"),
        ("xyzzy plugh frotz", None),
        ("1234 5678", None),
        ("η γάτα είναι στο σπίτι", None),
    ],
)
def test_languages(text, name):
    assert language([text]) == name


def test_no_prompt_is_guessed():
    queries, documents = zip(*ALIKE, strict=True)
    assert fitting_prompts(queries, documents)[0] == {}
    assert fitting_prompts(["qwx?"], ["rty uio pas dfg hjk"]) == (
        {}, "none: the texts are in no single language for which a prompt is known here",
    )  # fmt: skip
    assert fitting_prompts(["is it?"], ["is this the one?"])[0] == {}  # two questions: paraphrases
