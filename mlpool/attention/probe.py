"""The two forwards of the self-test (check.py): what is put into every layer, and what is read from it."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..pooling.base import running_dtype
from ..quantized import is_quantized, parts
from ..show import some
from ..taps import _MARK as _TAPS
from ..trunk import family_name, no_cache
from .families import PACKED_MARK, backend_of, family_of, window_of

_LONG, _SHORT = 8, 5  # tokens of the two texts
_MILD = 0.3  # of a token's size: another value to read, under a key that is hardly another
# The least change of the first token that counts as an answer, relative to its elements: above rounding that depends
# on the row, below what attention of a thousandth makes.
_ANSWER = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-6, torch.bfloat16: 2e-5}
# The largest error that padding may make, relative to what the layer adds. In low precision rotating by another
# position alone makes some hundredths; padding that is attended to makes a third and more. In float64 too the library
# works out rotations in float32.
AGREE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# A quantised layer rounds to codes, of which some flip by rounding alone, or by what else is in the batch. How much
# that does is measured on the layer itself (`_measure_noise`), and an effect counts from so many times that on. Above
# the largest noise neither an answer nor padding that is read could be told from it.
_TIMES, _MOST_NOISE = 4.0, 0.05
# Copies of a text, exact ones and those that differ by rounding: by so many units in the last place, in half precision
# (of which AGREE takes the rest) by one here and there.
_EXACT, _ROUNDED = 3, 6
_UNITS = {torch.float64: 4.0, torch.float32: 4.0, torch.float16: 0.125, torch.bfloat16: 0.125}


class AttentionCheckError(RuntimeError):
    """A model's attention is not as it claims or was asked to be; names family, backend and layers."""


@dataclass
class LayerReport:
    """What one layer did.

    Attributes:
        answers: batch → the largest relative change of the first token's output when the last token changes; 0.0 for
        none.
        errors: padding → error against the lone text, relative to what the layer adds.
        rounding: how large that error may be for rounding alone, where the layer adds little to a large input, or where
        it is quantised.
    """

    answers: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    rounding: float = 0.0


class Probe:
    """Two batches, and what the hooks around every layer do with them."""

    def __init__(self, trunk: Any, layers: nn.ModuleList, give_positions: bool):
        self.trunk, self.layers = trunk, layers
        self.packed = PACKED_MARK in trunk.__dict__  # the backend alone, without `pack`, takes padded batches
        self.give_positions = give_positions and family_of(trunk.config).text_positions
        # flash-attention counts a window without its end, the others with it
        self.reach = max((window_of(trunk.config) or _LONG) - 1, 1)
        self.generator = torch.Generator().manual_seed(0)
        self.reports = [LayerReport() for _ in layers]
        self.input_errors: dict[str, float] = {}
        self.inputs: dict[int, Tensor] = {}  # of each layer, the lone text's
        self.outputs: dict[int, Tensor] = {}
        self.dtype = torch.float32
        self.alike: Sequence[int] = ()  # rows of one text, in the forward that measures the noise of quantised layers
        self.noise = [(0.0, 0.0) for _ in layers]  # of each: how far its first token answers, and padding errs, by it

    def run(self) -> None:
        """The lone text first: the second forward is compared with it."""
        long, short = (ordinary_tokens(self.trunk, n, self.generator) for n in (_LONG, _SHORT))
        if is_quantized(self.layers):
            self._forward([(short, 1)], [], [])
            company = 2 * _SHORT + 2
            self.alike = range(company, company + _EXACT + _ROUNDED)
            self._forward([(long[:_SHORT], company), (short, len(self.alike))], ["company"], [])
            self.alike = ()
        if self.packed:
            self._forward([(short, 1)], [], [])
            groups = [(long, 2 * _LONG + 2), (short, 2 * _SHORT + 1)]
            self._forward(groups, ["first packed", "last packed"], [("packed", 1)])
        else:
            self._forward([(short, 2 * _SHORT + 2)], ["unpadded"], [])
            groups = [(long, 2 * _LONG + 2), (short, 2 * _SHORT + 1), (short, 2 * _SHORT + 1)]
            names = ["longest", "right-padded", "left-padded"]
            self._forward(groups, names, [("padded right", 1), ("padded left", 2)])

    def _forward(self, groups: list[tuple[Tensor, int]], names: list[str], padded: list[tuple[str, int]]) -> None:
        """One forward of copies of texts, (text, copies): a group's first row is the text, the others are to change.

        The last row of the first group stays a copy where there are `names` (of the groups). padded: of which groups.
        """
        rows = [text for text, copies in groups for _ in range(copies)]
        ends = torch.tensor([copies for _, copies in groups]).cumsum(0).tolist()
        spans = [range(end - copies, end) for end, (_, copies) in zip(ends, groups, strict=True)]
        self.groups = dict(zip(names, spans, strict=False))
        self.copy = spans[0][-1] if names else 0
        self.padded = {side: spans[index][0] for side, index in padded}
        call, places = self._lay_out(rows, left=spans[2] if len(spans) > 2 else ())
        handles = []
        self.rows, self.places = rows, places
        self.seen: list[int] = []
        try:
            for index, layer in enumerate(self.layers):
                handles += [
                    layer.register_forward_pre_hook(functools.partial(self._before, index), with_kwargs=True),  # type: ignore[arg-type]
                    layer.register_forward_hook(functools.partial(self._after, index)),  # type: ignore[arg-type]
                ]
            self.trunk(**call)
        except AttentionCheckError:
            raise
        except Exception as error:
            raise AttentionCheckError(
                f"{family_name(self.trunk)} on {backend_of(self.trunk.config)}: the forward of the self-test failed "
                f"behind layer {self.seen[-1] if self.seen else '-'}: {type(error).__name__}: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if self.seen != list(range(len(self.layers))):
            raise AttentionCheckError(
                f"of {len(self.layers)} layers of {type(self.trunk).__name__}, {self.seen} ran where the self-test "
                "sees them; check the attention before the layers are compiled or wrapped"
            )

    def _lay_out(self, rows: list[Tensor], left: Sequence[int]) -> tuple[dict[str, Any], list[Tensor]]:
        """The call's arguments, and each row's places among all tokens of the batch in one line."""
        device = device_of(self.trunk)
        lengths = [len(row) for row in rows]
        if self.packed:
            ends = torch.tensor(lengths).cumsum(0)
            places = [torch.arange(end - n, end) for n, end in zip(lengths, ends.tolist(), strict=True)]
            offsets = torch.cat([torch.zeros(1, dtype=torch.long), ends]).to(device, torch.int32)
            call: dict[str, Any] = {
                "input_ids": torch.cat(rows)[None].to(device),
                "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
                **{f"cu_seq_lens_{x}": offsets for x in "qk"},
                **{f"max_length_{x}": max(lengths) for x in "qk"},
            }
        else:
            width, pad = max(lengths), getattr(self.trunk.config, "pad_token_id", None)
            starts = [width - n if i in left else 0 for i, n in enumerate(lengths)]
            places = [torch.arange(n) + i * width + s for i, (n, s) in enumerate(zip(lengths, starts, strict=True))]
            mask = torch.zeros(len(rows) * width, dtype=torch.long)
            ids = torch.full_like(mask, pad if isinstance(pad, int) and pad >= 0 else 0)
            mask[torch.cat(places)] = 1
            ids[torch.cat(places)] = torch.cat(rows)
            mask, ids = (t.view(len(rows), width).to(device) for t in (mask, ids))
            call = {"input_ids": ids, "attention_mask": mask}
            if self.give_positions:
                call["position_ids"] = text_positions(mask)
        return call | no_cache(self.trunk), [place.to(device) for place in places]

    def _before(self, index: int, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        changed = self._change(index, self._flat(index, hidden)).view_as(hidden)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    def _after(self, index: int, _: nn.Module, __: tuple, output: Any) -> None:
        self._judge(index, self._flat(index, output[0] if isinstance(output, tuple) else output))
        self.seen.append(index)

    def _flat(self, index: int, hidden: Tensor) -> Tensor:
        tokens = sum(map(len, self.rows)) if self.packed else len(self.rows) * max(map(len, self.rows))
        if hidden.dim() < 2 or hidden.numel() != tokens * hidden.shape[-1]:
            raise AttentionCheckError(
                f"layer {index} works on {list(hidden.shape)}, expected {tokens} tokens: a model that removes padding "
                "inside cannot be checked (turn its unpadding off)"
            )
        return hidden.reshape(tokens, hidden.shape[-1])

    def _change(self, index: int, hidden: Tensor) -> Tensor:
        """The layer's own input [tokens, D] → with what this test puts into it."""
        hidden, places = hidden.clone(), [place.to(hidden.device) for place in self.places]
        if index not in self.inputs:
            self.inputs[index] = hidden[places[0]]
        for side, row in self.padded.items():
            if index == 0:
                self.input_errors[side] = error_of(hidden[places[row]], self.inputs[0], self.inputs[0])
            hidden[places[row]] = self.inputs[index].to(hidden.dtype)
        for i, row in enumerate(self.alike):
            text = self.inputs[index].to(hidden.dtype)
            units = 0.0 if i < _EXACT else _UNITS.get(hidden.dtype, 0.0) * torch.finfo(hidden.dtype).eps
            hidden[places[row]] = text * (1 + units * torch.randn(text.shape, generator=self.generator).to(text))
        for rows in self.groups.values():
            text = hidden[places[rows[0]]]
            last, noise = min(len(text) - 1, self.reach), torch.empty(0)
            for place, row in enumerate(rows[1:]):
                hidden[places[row]] = text
                if row == self.copy:
                    continue
                # The last token itself, or one of those that the first may read in its stead; each with a noise and
                # with its opposite, of which one makes it read more.
                token, size = (text[last], 1.0) if place < 2 else (text[(place // 2 - 1) % last], _MILD)
                noise = -noise if place % 2 else torch.randn(hidden.shape[-1], generator=self.generator)
                noise = noise.to(hidden.device)
                scale = size * token.float().square().mean().sqrt().clamp_min(1e-6)
                hidden[places[row][last]] = token + (noise * scale).to(hidden.dtype)
        return hidden

    def _judge(self, index: int, output: Tensor) -> None:
        """What came out of the layer, [tokens, D]."""
        self.dtype = precision_of(output)
        report, places = self.reports[index], [place.to(output.device) for place in self.places]
        if index not in self.outputs:
            self.outputs[index] = output[places[0]]
        alone = self.outputs[index]
        if not alone.isfinite().all():
            raise AttentionCheckError(_not_finite(self.trunk, index, self.dtype))
        added = alone - self.inputs[index].to(alone.dtype)
        if self.alike:
            self._measure_noise(index, output[torch.stack([places[row] for row in self.alike])], added)
            return
        answering, erring = (_TIMES * noise for noise in self.noise[index])
        rounding = 4 * torch.finfo(self.dtype).eps * _size(alone) / max(_size(added), 1e-30)
        report.rounding = max(rounding, erring)
        for side, row in self.padded.items():
            report.errors[side] = error_of(output[places[row]], alone, added)
        if not self.groups:
            return
        first = output[torch.stack([place[0] for place in places])].double()
        floor = max(_ANSWER[self.dtype], answering, 4 * _change_of(first[0], first[self.copy]))
        for batch, rows in self.groups.items():
            change = max(_change_of(first[rows[0]], first[row]) for row in rows[1:] if row != self.copy)
            report.answers[batch] = change if change > floor else 0.0

    def _measure_noise(self, index: int, texts: Tensor, added: Tensor) -> None:
        """How far outputs of one text [n, T, D] are apart, exact copies first, and how far they are from it alone.

        Neither another token nor padding is in it, so that it hides nothing of what attention does.
        """
        first = texts[:, 0].double()
        answering = max(_change_of(first[0], other) for other in first[1:_EXACT])
        erring = max(error_of(text, self.outputs[index], added) for text in texts)
        if not max(answering, erring) <= _MOST_NOISE:
            raise AttentionCheckError(
                f"{family_name(self.trunk)}: layer {index} is quantised so coarsely that a text differs by "
                f"{max(answering, erring):.1e} for rounding and its company in the batch alone (its attention can be "
                f"tested up to {_MOST_NOISE}); take more bits, or quantise the weights only"
            )
        self.noise[index] = answering, erring


def embedding_table(trunk: nn.Module) -> nn.Embedding:
    """The token embeddings; ValueError where there is no one table of them."""
    with suppress(NotImplementedError, AttributeError):
        table: Any = trunk.get_input_embeddings()  # type: ignore[operator]
        if isinstance(getattr(table, "weight", None), Tensor):
            return table
    raise ValueError(
        f"{type(trunk).__name__} has no one table of token embeddings (CANINE hashes characters, a speech model adds "
        "up several), from which the vocabulary, the device and tokens for the self-test are known; such models are "
        "not supported"
    )


def ordinary_tokens(trunk: Any, count: int, generator: torch.Generator) -> Tensor:
    """[count] random tokens of the vocabulary, none of them special."""
    special = {getattr(trunk.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep")}
    size = getattr(trunk.config, "vocab_size", None) or embedding_table(trunk).num_embeddings
    drawn = torch.randint(size, (64 + count,), generator=generator).tolist()
    return torch.tensor([token for token in drawn if token not in special][:count])


def device_of(trunk: nn.Module) -> torch.device:
    """Where its tokens belong; an offloaded model's hook moves them."""
    weight = embedding_table(trunk).weight
    return torch.device("cpu") if weight.is_meta else weight.device


def require_weights(trunk: nn.Module) -> None:
    """ValueError for a model on the meta device."""
    offloaded = any(hasattr(module, "_hf_hook") for module in trunk.modules())  # whose weights come when they are used
    if not offloaded and any(parameter.is_meta for parameter in trunk.parameters()):
        raise ValueError(
            f"{type(trunk).__name__} is on the meta device, so nothing can be tried on it; load its weights first, or "
            "leave the self-test out (check=False) and call check_attention(model) once they are there"
        )


def _not_finite(trunk: nn.Module, index: int, dtype: torch.dtype) -> str:
    """What to say of a layer whose output is NaN or infinite: the weights that are."""
    family = family_name(trunk)
    named = [(name, part) for name, p in trunk.named_parameters() for part in parts(p)]
    wrong = [name for name, part in named if not part.is_meta and not part.isfinite().all()]
    if wrong:
        return (
            f"{family} holds NaN or infinite weights: {some(wrong)}; a training that diverged or a file "
            "that is damaged? Load weights that are finite"
        )
    return (
        f"{family}: the output of layer {index} is NaN or infinite in {str(dtype).removeprefix('torch.')}, though all "
        "weights are finite (an overflow?); try another dtype"
    )


def text_positions(mask: Tensor) -> Tensor:
    """attention_mask [B, T] → position_ids [B, T] int64, counted from each text's first token; 0 before it."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def _change_of(one: Tensor, other: Tensor) -> float:
    """Mean relative difference of two tokens' elements; no element counts alone, however large."""
    scale = one.abs() + other.abs() + one.abs().median()
    return ((one - other).abs() / scale.clamp_min(1e-30)).mean().item()


def error_of(got: Tensor, expected: Tensor, scale: Tensor) -> float:
    return _size(got.double() - expected.double()) / max(_size(scale), 1e-30)


def _size(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def precision_of(output: Tensor) -> torch.dtype:
    dtype = running_dtype(output)
    return dtype if dtype in AGREE else torch.bfloat16


@contextmanager
def undisturbed(trunk: nn.Module) -> Iterator[None]:
    """Evaluation without gradients, dropout or taps; afterwards everything is as before, random state included."""
    training = [module for module in trunk.modules() if module.training]
    devices = sorted({p.device.index for p in trunk.parameters() if p.device.type == "cuda"})
    taps = trunk.__dict__.pop(_TAPS, None)  # without the mark, taps let a forward pass
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in training:
            module.training = True
        if taps is not None:
            trunk.__dict__[_TAPS] = taps
