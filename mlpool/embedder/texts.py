"""Texts to token ids: what the model expects around a text, EOS exactly once, and a cut that is counted.

A tokenizer's own frame (BOS or CLS before, EOS or SEP behind) is found by tokenizing short probes with and without
special tokens; where those are nothing to it (a vocabulary without Latin letters), its own tokens. Where it puts
nothing behind a text, as decoders' tokenizers do, the EOS token is appended. Only the content is cut, so the frame is
there however long a text is; and its full length is known, so the cut can be reported.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import not_unicode

_PROBES = ("a", "two words")
_SEARCHED = 1000  # tokens of a vocabulary that are tried as probes
_UNLIMITED = 10**9  # tokenizers without a limit say 10^30
_BLOCK = 4096  # texts tokenized at a time: the tokenizer's own results are a hundred times as large as the ids


@dataclass
class Truncated:
    """What has been cut. count: texts. longest: tokens of the longest of them. limit: tokens that are kept."""

    count: int = 0
    longest: int = 0
    limit: int = 0


@dataclass
class TokenIds:
    """Token ids of a batch of texts.

    Attributes:
        ids: the token ids of each text, framed, int32 [T] (a tenth of the memory of a list). skipped: how many of its
        first tokens are BOS and prompt, and not to be pooled; None where everything is pooled. uncut: how many tokens
        each text has, of which `ids` may be the first; None where that is not known.
    """

    ids: list[np.ndarray]
    skipped: list[int] | None = None
    uncut: list[int] | None = None

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def padded(self, rows: Sequence[int], pad: int) -> dict[str, Tensor]:
        """Padded on the right: input_ids and attention_mask, int64 [B, T], and token_mask where tokens are skipped."""
        lengths = torch.tensor([len(self.ids[row]) for row in rows])
        input_ids = torch.full((len(rows), int(lengths.max())), pad)
        for i, row in enumerate(rows):
            input_ids[i, : len(self.ids[row])] = torch.from_numpy(self.ids[row])
        place = torch.arange(input_ids.shape[1])
        features = {"input_ids": input_ids, "attention_mask": (place < lengths[:, None]).long()}
        if self.skipped is not None:
            skipped = torch.tensor([self.skipped[row] for row in rows])
            features["token_mask"] = (place >= skipped[:, None]).long() * features["attention_mask"]
        return features

    def packed(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """One row: input_ids int64 [1, total], cu_seqlens int32 [B+1]; token_mask [total] where tokens are skipped."""
        lengths = torch.tensor([0] + [len(self.ids[row]) for row in rows])
        features = {
            "input_ids": torch.from_numpy(np.concatenate([self.ids[row] for row in rows])).long()[None],
            "cu_seqlens": lengths.cumsum(0).int(),
        }
        if self.skipped is not None:
            place = torch.cat([torch.arange(len(self.ids[row])) - self.skipped[row] for row in rows])
            features["token_mask"] = (place >= 0).long()
        return features


class TextTokenizer:
    """A Hugging Face tokenizer, fast or slow, as embedders need it.

    Args:
        tokenizer: left as it is, but for a pad token where it has none (its EOS or UNK; no vocabulary is resized).
        append_eos, include_prompt, include_bos: as of `mlpool.load`.
        vocabulary: the number of the model's token embeddings, where known.

    Raises:
        ValueError: append_eos with a tokenizer that has no EOS token; a frame that depends on the text, or that the
            model has no embedding for; a tokenizer to which no text is a token.
    """

    def __init__(
        self, tokenizer: Any, append_eos: bool = True, include_prompt: bool = True, include_bos: bool = True,
        vocabulary: int | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.include_prompt, self.include_bos = include_prompt, include_bos
        self.prefix, self.suffix = self._frame()
        if append_eos and not self.suffix:
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    f"{type(tokenizer).__name__} puts no token behind a text and has no EOS token to append; set "
                    "tokenizer.eos_token, or load with append_eos=False (the last token of the text then counts)"
                )
            self.suffix = [tokenizer.eos_token_id]
        unknown = [token for token in self.prefix + self.suffix if vocabulary is not None and token >= vocabulary]
        if unknown:
            names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in unknown)
            raise ValueError(
                f"the tokenizer puts {names} around a text, and the model has embeddings of {vocabulary} tokens only; "
                "use the tokenizer that belongs to the model"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        pad = tokenizer.pad_token_id
        # Behind a mask nothing reads it; 0 is in every vocabulary, an added pad token may not be in the model's.
        self.pad = 0 if pad is None or (vocabulary is not None and pad >= vocabulary) else pad
        self.truncated = Truncated()

    def limit(self) -> int | None:
        """The tokenizer's own limit of tokens, if it has one."""
        limit = getattr(self.tokenizer, "model_max_length", None)
        return limit if limit is not None and limit < _UNLIMITED else None

    def __call__(self, texts: Sequence[str], prompt: str | None = None, max_length: int | None = None) -> TokenIds:
        """Tokenize texts.

        Args:
            prompt: put before each text as it is. max_length: tokens, the frame counted; None is no limit.

        Raises:
            ValueError: a row that is no string, half a surrogate pair, a prompt that leaves no room, a text without any
                token.
        """
        check_texts(texts)
        if prompt and not_unicode(prompt) is not None:
            raise ValueError(f"the prompt {prompt!r} holds half a surrogate pair, which is no character")
        ids: list[np.ndarray] = []
        skipped: list[int] = []
        uncut: list[int] = []
        for start in range(0, len(texts), _BLOCK):
            block = texts[start : start + _BLOCK]
            contents, prompts = self._contents([prompt + text for text in block] if prompt else block, prompt or "")
            self._check_room(max(prompts), max_length)
            for row, (content, prompt_tokens) in enumerate(zip(contents, prompts, strict=True), start):
                framed, length = self._framed(content, max_length)
                if not framed:
                    raise ValueError(
                        f"row {row} ({texts[row]!r}) has no token; leave it out, or load with append_eos=True"
                    )
                ids.append(np.array(framed, dtype=np.int32))
                uncut.append(length)
                # BOS stands before the prompt: without the prompt it is not pooled either. One token always is.
                if prompt_tokens and not self.include_prompt:
                    unread = len(self.prefix) + prompt_tokens
                else:
                    unread = 0 if self.include_bos else len(self.prefix)
                skipped.append(min(unread, len(framed) - 1))
        return TokenIds(ids, None if self.include_prompt and self.include_bos else skipped, uncut)

    def _framed(self, content: list[int], max_length: int | None) -> tuple[list[int], int]:
        """A text's tokens, cut to fit, between what goes before and behind; and how many they were, uncut."""
        frame = len(self.prefix) + len(self.suffix)
        content = self._without_eos(content)
        length = len(content) + frame
        if max_length is not None and length > max_length:
            seen = self.truncated
            self.truncated = Truncated(seen.count + 1, max(seen.longest, length), max_length)
            content = self._without_eos(content[: max_length - frame])
        return self.prefix + content + self.suffix, length

    def _without_eos(self, content: list[int]) -> list[int]:
        """Less the EOS that is written out at the end of the text."""
        end = len(content)
        while self.suffix and end and content[end - 1] == self.suffix[-1]:
            end -= 1
        return content[:end]

    def _check_room(self, prompt: int, max_length: int | None) -> None:
        frame = len(self.prefix) + len(self.suffix)
        if max_length is not None and frame + prompt >= max_length:
            raise ValueError(
                f"max_seq_length is {max_length} tokens, and {prompt} of prompt with {frame} of BOS and EOS leave no "
                "room for a text; raise max_seq_length or shorten the prompt"
            )

    def _contents(self, texts: Sequence[str], prompt: str) -> tuple[list[list[int]], list[int]]:
        """Token ids without the frame, and how many of each are the prompt's."""
        options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        if not prompt or self.include_prompt:
            length = len(self.tokenizer(prompt, **options)["input_ids"]) if prompt else 0
            return self.tokenizer(list(texts), **options)["input_ids"], [length] * len(texts)
        if not self.tokenizer.is_fast:
            raise ValueError(
                "include_prompt=False needs a fast tokenizer, which tells where in the text a token stands"
            )
        batch = self.tokenizer(list(texts), return_offsets_mapping=True, **options)
        # A token that reaches into the text is the text's.
        inside = [sum(end <= len(prompt) for _, end in offsets) for offsets in batch["offset_mapping"]]
        return batch["input_ids"], inside

    def _frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before and behind a text."""
        frames, probes = [], self._probes()
        for text, inner in probes.items():
            outer = self.tokenizer(text, verbose=False)["input_ids"]
            starts = [i for i in range(len(outer) - len(inner) + 1) if outer[i : i + len(inner)] == inner]
            frames += [(outer[:i], outer[i + len(inner) :]) for i in starts[:1]]
        if len(frames) < len(probes) or any(frame != frames[0] for frame in frames):
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not put the same special tokens around every text (probes "
                f"{tuple(probes)}: {frames}), so where EOS belongs is not known"
            )
        return frames[0]

    def _probes(self) -> dict[str, list[int]]:
        """Two texts, each with its tokens, of which there are some: without any, what goes before and behind is one."""
        special = set(self.tokenizer.all_special_ids)
        found: dict[str, list[int]] = {}
        own = (token for token, index in sorted(self.tokenizer.get_vocab().items()) if index not in special)
        texts = (str(self.tokenizer.convert_tokens_to_string([token])) for token in itertools.islice(own, _SEARCHED))
        for text in itertools.chain(_PROBES, texts):
            inner = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            if inner and inner not in found.values():
                found[text] = inner
            if len(found) == len(_PROBES):
                return found
        raise ValueError(
            f"{type(self.tokenizer).__name__} makes no tokens of {_PROBES} nor of the first {_SEARCHED} tokens of its "
            f"own vocabulary ({len(found)} of 2 texts), so what it puts around a text cannot be found; is it the "
            "model's tokenizer, and does its normalizer or pre-tokenizer drop all text?"
        )


def check_texts(texts: Sequence[Any]) -> None:
    """Raises ValueError, with the rows named, where a text is no string, or holds half a surrogate pair."""
    wrong = [(i, text) for i, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        rows = ", ".join(f"row {i} is {type(text).__name__} ({str(text)[:40]!r})" for i, text in wrong[:5])
        raise ValueError(f"texts must be strings, but {len(wrong)} of {len(texts)} are not: {rows}")
    if halves := [i for i, text in enumerate(texts) if not_unicode(text) is not None]:
        rows = ", ".join(f"row {i} ({texts[i][:40]!r})" for i in halves[:5])
        raise ValueError(
            f"{len(halves)} of {len(texts)} texts hold half a surrogate pair, which is no character: {rows}; decode "
            'them from their bytes again, or text.encode("utf-8", "replace").decode()'
        )
