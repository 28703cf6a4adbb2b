"""Texts to token ids: EOS exactly once whatever the tokenizer does, the cut, and what is pooled."""

import logging

import numpy as np
import pytest
import tiny
import transformers
from tiny import BOS, EOS, FRAMES, PAD, TEXTS

from mlpool.embedder.texts import TextTokenizer, TokenIds


def ids_of(tokens: TokenIds) -> list[list[int]]:
    return [ids.tolist() for ids in tokens.ids]


def content(text: str) -> list[int]:
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


class Slow(transformers.PreTrainedTokenizer):
    """A slow tokenizer, a token a character; appends EOS if it is told to."""

    def __init__(self, appends=False, **options):
        self.appends = appends
        super().__init__(eos_token="</s>", unk_token="<unk>", **options)

    vocab_size = 130

    def get_vocab(self):
        return {"<unk>": 0, "</s>": 1, **{chr(i): i for i in range(2, 130)}}

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index):
        return {0: "<unk>", 1: "</s>"}.get(index, chr(index))

    def build_inputs_with_special_tokens(self, ids, other=None):
        return ids + [1] * self.appends


@pytest.mark.parametrize("frame", FRAMES)
def test_eos_stands_once_at_the_end(frame):
    tokenizer = TextTokenizer(tiny.tokenizer(frame))
    assert (tokenizer.prefix, tokenizer.suffix) == (FRAMES[frame][0], [EOS])
    for text, ids in zip(TEXTS, ids_of(tokenizer(TEXTS)), strict=True):
        assert ids == [*FRAMES[frame][0], *content(text), EOS]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("text", ["a text</s>", "a text</s></s>", "</s>", "a </s> text"])
def test_eos_written_in_the_text(frame, text):
    (ids,) = ids_of(TextTokenizer(tiny.tokenizer(frame))([text]))
    inner = content(text)
    while inner and inner[-1] == EOS:
        inner.pop()
    assert ids == [*FRAMES[frame][0], *inner, EOS]
    assert EOS in content(text)  # the text does hold the token


@pytest.mark.parametrize("frame", FRAMES)
def test_eos_stands_once_behind_a_cut(frame):
    tokenizer = TextTokenizer(tiny.tokenizer(frame))
    long, at_the_cut = "one two three four five six", "a</s>" * 4
    for limit in range(len(tokenizer.prefix) + 2, 12):
        for text, ids in zip((long, at_the_cut), ids_of(tokenizer([long, at_the_cut], max_length=limit)), strict=True):
            inner = content(text)[: limit - len(tokenizer.prefix) - 1]
            assert len(ids) <= limit
            assert ids == [*tokenizer.prefix, *(inner[:-1] if inner[-1] == EOS else inner), EOS]


def greek(frame: str, letters: str = "αβγδε", **options):
    """A BPE tokenizer whose vocabulary has no Latin letter, and no token for what it does not know."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=20, special_tokens=tiny.SPECIAL, show_progress=False)
    bpe.train_from_iterator([f"{letters} {letters[::-1]}"], trainer)
    template = " ".join(
        [*(tiny.SPECIAL[i] for i in FRAMES[frame][0]), "$A", *(tiny.SPECIAL[i] for i in FRAMES[frame][1])]
    )
    bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **options)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_tokenizer_without_latin_letters(frame):
    """The usual probes are nothing to it; they would put BOS behind a text, and no EOS."""
    tokenizer = greek(frame)
    assert tokenizer("a two words", add_special_tokens=False)["input_ids"] == []
    framed = TextTokenizer(tokenizer)
    assert (framed.prefix, framed.suffix) == (FRAMES[frame][0], [EOS])
    (ids,) = ids_of(framed(["αβ γ"]))
    assert ids == [*FRAMES[frame][0], *tokenizer("αβ γ", add_special_tokens=False)["input_ids"], EOS]
    assert len(ids) > len(FRAMES[frame][0]) + 1


def test_a_tokenizer_that_drops_all_text_is_refused():
    from tokenizers import Regex, normalizers

    tokenizer = greek("both")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(".+"), "")
    with pytest.raises(
        ValueError, match=r"makes no tokens of \('a', 'two words'\) nor .* cannot be found; is it the model"
    ):
        TextTokenizer(tokenizer)


@pytest.mark.parametrize("appends", [False, True])
def test_slow_tokenizer(appends):
    tokenizer = TextTokenizer(Slow(appends))
    assert ids_of(tokenizer(["ab", ""], max_length=5)) == [[97, 98, 1], [1]]
    assert ids_of(tokenizer(["ab"], prompt="c")) == [[99, 97, 98, 1]]
    with pytest.raises(ValueError, match="include_prompt=False needs a fast tokenizer"):
        TextTokenizer(Slow(), include_prompt=False)(["ab"], prompt="c")


def test_without_eos():
    bare = TextTokenizer(tiny.tokenizer(), append_eos=False)
    assert bare.suffix == []
    assert ids_of(bare(["a", "a</s>"])) == [content("a"), content("a</s>")]
    assert TextTokenizer(tiny.tokenizer("both"), append_eos=False).suffix == [EOS]  # its own it keeps


def test_a_text_without_any_token_is_named():
    texts = ["a"] * 5000 + [""]  # beyond the first block
    with pytest.raises(ValueError, match=r"row 5000 \(''\) has no token.*append_eos=True"):
        TextTokenizer(tiny.tokenizer(), append_eos=False)(texts)


def test_tokenizer_without_an_eos_token():
    tokenizer = tiny.tokenizer(eos_token=None)
    with pytest.raises(ValueError, match=r"has no EOS token to append; set tokenizer\.eos_token, or load with append"):
        TextTokenizer(tokenizer)
    assert TextTokenizer(tokenizer, append_eos=False).suffix == []
    assert TextTokenizer(tiny.tokenizer("eos", eos_token=None)).suffix == [EOS]  # its post-processor appends one


def test_frame_that_the_model_has_no_embedding_for():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    with pytest.raises(ValueError, match=rf"puts '<new>' \({len(tokenizer) - 1}\) around a text.*of 300 tokens only"):
        TextTokenizer(tokenizer, vocabulary=300)


def test_frame_that_depends_on_the_text():
    tokenizer = tiny.tokenizer()
    call = type(tokenizer).__call__

    class Odd(type(tokenizer)):
        def __call__(self, text, **options):
            batch = call(self, text, **options)
            if options.get("add_special_tokens", True) and " " in text:
                batch["input_ids"] = [BOS, *batch["input_ids"]]
            return batch

    tokenizer.__class__ = Odd
    with pytest.raises(ValueError, match="does not put the same special tokens around every text"):
        TextTokenizer(tokenizer)


# --- padding ----------------------------------------------------------------------------------------------------------


def test_pad_token():
    assert TextTokenizer(tiny.tokenizer(pad_token="<pad>")).pad == PAD
    without = tiny.tokenizer()
    assert TextTokenizer(without).pad == EOS
    assert without.pad_token == "</s>"
    nothing = tiny.tokenizer("eos", eos_token=None, unk_token=None)
    assert TextTokenizer(nothing).pad == 0
    assert len(without) == len(nothing) == len(tiny.tokenizer())  # no token was added


def test_pad_token_outside_of_the_model():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    added = len(tokenizer) - 1
    assert TextTokenizer(tokenizer).pad == added
    assert TextTokenizer(tokenizer, vocabulary=added).pad == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_packed(side):
    tokenizer = tiny.tokenizer("both", padding_side=side, truncation_side=side)
    tokens = TextTokenizer(tokenizer, include_bos=False)(["ab c", "a"])
    (first, second), pad = ids_of(tokens), 7
    assert len(first) > len(second) == 3
    gap = len(first) - 3
    padded = tokens.padded([1, 0], pad)
    assert padded["input_ids"].tolist() == [second + [pad] * gap, first]
    assert padded["attention_mask"].tolist() == [[1] * 3 + [0] * gap, [1] * len(first)]
    assert padded["token_mask"].tolist() == [[0, 1, 1] + [0] * gap, [0] + [1] * (len(first) - 1)]
    packed = tokens.packed([1, 0])
    assert packed["input_ids"].tolist() == [second + first]
    assert packed["cu_seqlens"].tolist() == [0, 3, 3 + len(first)]
    assert packed["token_mask"].tolist() == [0, 1, 1, 0] + [1] * (len(first) - 1)


# --- what is pooled ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Q: ", "Instruct: find it\nQuery: ", "東京: "])
@pytest.mark.parametrize("bos", [True, False])
def test_skipped_tokens(prompt, bos):
    tokenizer = TextTokenizer(tiny.tokenizer("both"), include_prompt=False, include_bos=bos)
    texts = ["how many", "a", "東京", "xyz"]
    tokens = tokenizer(texts, prompt)
    for text, ids, skipped in zip(texts, tokens.ids, tokens.skipped, strict=True):
        pooled = tiny.tokenizer().decode(ids[skipped:-1])
        assert pooled.strip() == text  # the blank before a word is in its token
        assert ids.tolist() == [BOS, *content(prompt + text), EOS]
    assert tokenizer(texts).skipped == [0 if bos else 1] * 4
    assert TextTokenizer(tiny.tokenizer("both"), include_bos=bos)(texts, prompt).skipped == (None if bos else [1] * 4)


def test_at_least_one_token_is_pooled():
    tokenizer = TextTokenizer(tiny.tokenizer("bos"), append_eos=False, include_prompt=False, include_bos=False)
    tokens = tokenizer(["", ""], "Q:")
    assert [len(ids) for ids in tokens.ids] == [3, 3]
    assert tokens.skipped == [2, 2]
    assert tokenizer([""]).skipped == [0]


def test_prompt_stands_before_each_text():
    ids = ids_of(TextTokenizer(tiny.tokenizer())(["a", ""], "Q: "))
    assert ids == [[*content("Q: a"), EOS], [*content("Q: "), EOS]]


# --- the cut ----------------------------------------------------------------------------------------------------------


def test_cut_is_counted():
    tokenizer = TextTokenizer(tiny.tokenizer("both"))
    texts = ["x y z", "a", "x" * 100_000, "ab"]
    whole = [len(ids) for ids in tokenizer(texts).ids]
    assert tokenizer.truncated.count == 0
    tokens = tokenizer(texts, max_length=5)
    assert max(len(ids) for ids in tokens.ids) == 5
    seen = tokenizer.truncated
    assert (seen.count, seen.longest, seen.limit) == (sum(n > 5 for n in whole), max(whole), 5)
    assert max(whole) > 20_000


def test_exactly_as_long_as_allowed():
    tokenizer = TextTokenizer(tiny.tokenizer())
    (ids,) = ids_of(tokenizer(["abc"]))
    assert ids_of(tokenizer(["abc", "abc</s>"], max_length=len(ids))) == [ids, ids]
    assert tokenizer.truncated.count == 0


@pytest.mark.parametrize("include", [True, False])
def test_no_room_for_a_text(include):
    tokenizer = TextTokenizer(tiny.tokenizer("both"), include_prompt=include)
    prompt = "Instruct: "
    room = len(content(prompt)) + 2
    with pytest.raises(ValueError, match=rf"max_seq_length is {room} tokens, and {room - 2} of prompt with 2 of BOS"):
        tokenizer(["a"], prompt, max_length=room)
    assert len(tokenizer(["a b"], prompt, max_length=room + 1).ids[0]) == room + 1
    with pytest.raises(ValueError, match="max_seq_length is 2 tokens, and 0 of prompt with 2"):
        tokenizer(["a"], max_length=2)


def test_half_a_surrogate_pair():
    """Tokenizers say "TextEncodeInput must be Union[…]" of it."""
    texts = TextTokenizer(tiny.tokenizer())
    with pytest.raises(ValueError, match=r"1 of 3 texts hold half a surrogate pair.*row 1 \('a\\ud83d'\); decode"):
        texts(["🙂", "a\ud83d", "b"])
    with pytest.raises(ValueError, match=r"the prompt '\\ud83d' holds half a surrogate pair"):
        texts(["a"], prompt="\ud83d")
    assert len(texts(["a\ud83d".encode("utf-8", "replace").decode()]).ids) == 1


def test_rows_that_are_no_strings():
    with pytest.raises(ValueError, match=r"2 of 4 are not: row 1 is NoneType \('None'\), row 3 is float \('nan'\)"):
        TextTokenizer(tiny.tokenizer())(["a", None, "b", float("nan")])


def test_the_tokenizer_is_silent_and_as_it_was(caplog):
    tokenizer = tiny.tokenizer("eos", model_max_length=8, padding_side="left", pad_token="<pad>")
    before = tokenizer.backend_tokenizer.to_str()
    with caplog.at_level(logging.WARNING):
        tokens = TextTokenizer(tokenizer)(["x y " * 50])
    assert len(tokens.ids[0]) > 50
    assert not caplog.records
    assert tokenizer.backend_tokenizer.to_str() == before
    assert TextTokenizer(tokenizer).limit() == 8
    assert TextTokenizer(tiny.tokenizer()).limit() is None


def test_many_texts_are_small_in_memory():
    tokens = TextTokenizer(tiny.tokenizer())(["x y z"] * 5)
    assert all(isinstance(ids, np.ndarray) and ids.dtype == np.int32 for ids in tokens.ids)
    assert TextTokenizer(tiny.tokenizer())([]).ids == []
