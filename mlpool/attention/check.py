"""The self-test of a model's attention: which way each layer looks, and whether padding changes anything.

A patch that reaches some layers only, one backend only or unpadded batches only is silent: the loss still falls and
the embeddings are merely worse. Two short forwards tell. In them, at every layer:

- Copies of a text enter the layer with another last token: the token with random noise, and each of the others with
  mild noise. The layer is bidirectional if its output at the first token answers to one of them. Several, since
  attention may be so saturated that the first token reads one other token alone: what resembles that one is read
  too. Copies are made anew from each layer's own input: noise put into the tokens once would reach the first token of
  all later layers through a single bidirectional one. It is random because a norm removes a constant.
- A text padded left and the same padded right enter as the text entered when alone, and must leave as it left then.
  So a fault is found in the layer that makes it, and rounding does not add up over the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..pooling.base import check_choice
from ..trunk import family_name, find_layers
from .families import attentions, backend_of, family_of, flagged
from .probe import AGREE, AttentionCheckError, LayerReport, Probe, require_weights, undisturbed


@dataclass
class AttentionReport:
    """What was measured: of the model as it ran, of each layer, and of the input of the first (`input_errors`)."""

    family: str
    backend: str
    dtype: torch.dtype
    layers: list[LayerReport]
    input_errors: dict[str, float]

    @property
    def bidirectional(self) -> bool:
        """Every layer looks both ways, padded or not."""
        return all(answer for layer in self.layers for answer in layer.answers.values())

    @property
    def causal(self) -> bool:
        """No layer looks ahead, padded or not."""
        return not any(answer for layer in self.layers for answer in layer.answers.values())

    @property
    def padding_error(self) -> float:
        """The largest error of any layer."""
        return max(error for layer in self.layers for error in layer.errors.values())


def check_attention(model: nn.Module, expect: str | None = None) -> AttentionReport:
    """Test a model's attention by two short forwards, on the backend and in the dtype it has.

    In every layer the first token's output must answer to changes of the last token of that layer's own input (for a
    causal model: must not), in padded and in unpadded batches; and one text padded left, padded right and alone must
    come out the same of every layer (encoders: padded right and alone; packed models: packed and alone). The
    last token is the last one within the sliding window, where that is shorter than the texts. The model stays as it
    was: mode, gradients, random state, hooks, config. Under `torch.autocast` the tolerances are its dtype's.

    Args:
        model: as for `bidirectional`.
        expect: "bidirectional" or "causal"; None is what the model claims to be. Causal families that need
            position_ids for left padding (GPT-2) get them.

    Returns: what was measured.

    Raises:
        AttentionCheckError: the model is otherwise (names family, backend, layers and the cause where it is known),
            its forward fails, a weight is NaN or infinite (named), or its layers cannot be watched (compiled ones,
            padding removed inside the model).
        ValueError: an unknown `expect`, an encoder-decoder, a model whose layers are not found, weights on meta.
    """
    if expect is not None:
        check_choice("expect", expect, ("bidirectional", "causal"))
    trunk, layers = find_layers(model)
    if expect is None:
        expect = "bidirectional" if claims_bidirectional(trunk, layers) else "causal"
    report = measure(trunk, layers, give_positions=expect == "causal")
    ignored = ("padded left",) if expect == "bidirectional" and is_encoder(trunk, layers) else ()
    problems = _problems(report, expect, ignored)
    if problems:
        advice = family_of(trunk.config).advice
        raise AttentionCheckError(
            f"{report.family} on {report.backend} ({str(report.dtype).removeprefix('torch.')}) is not sound as a "
            f"{expect} model: {'; '.join(problems)}{f'. Known of {report.family}: {advice}' if advice else ''}"
        )
    return report


def claims_bidirectional(trunk: nn.Module, layers: nn.ModuleList) -> bool:
    """What config and modules say; only `measure` says what is true."""
    return flagged(trunk.config) or is_encoder(trunk, layers)


def is_encoder(trunk: nn.Module, layers: nn.ModuleList) -> bool:
    """Bidirectional from the start: nothing says causal, and it was measured, since CLIP's text model flags nothing.

    Where it cannot be measured (padding removed inside, weights on meta), the modules' own flags count.
    """
    flags = [module.is_causal for module in attentions(layers)]
    if getattr(trunk.config, "is_decoder", False) or any(flags) or flagged(trunk.config):
        return False
    try:
        return measure(trunk, layers).bidirectional
    except (AttentionCheckError, ValueError):
        if not flags:
            raise
        return True


def measure(trunk: nn.Module, layers: nn.ModuleList, give_positions: bool = False) -> AttentionReport:
    """Run both forwards and say what came of them."""
    require_weights(trunk)
    probe = Probe(trunk, layers, give_positions)
    with undisturbed(trunk):
        probe.run()
    backend = backend_of(trunk.config)
    return AttentionReport(family_name(trunk), backend, probe.dtype, probe.reports, probe.input_errors)


def _problems(report: AttentionReport, expect: str, ignored: Sequence[str] = ()) -> list[str]:
    problems, tolerance = [], AGREE[report.dtype]
    silent, verb = expect == "bidirectional", "does not answer" if expect == "bidirectional" else "answers"
    for batch in report.layers[0].answers:
        wrong = [i for i, layer in enumerate(report.layers) if (layer.answers[batch] == 0.0) == silent]
        if wrong:
            problems.append(f"in {_layers(wrong)} the first token {verb} to the last ({batch} text)")
    for side in report.input_errors:
        if side in ignored:
            continue
        error = report.input_errors[side]
        if not error <= tolerance:
            problems.append(f"the input of layer 0 differs by {error:.1e} between a text {side} and alone")
        errors = [layer.errors[side] for layer in report.layers]
        wrong = [i for i, layer in enumerate(report.layers) if not errors[i] <= tolerance + layer.rounding]  # or NaN
        if wrong:
            worst = max(errors[i] for i in wrong)
            problems.append(f"in {_layers(wrong)} a text {side} and alone differ by up to {worst:.1e} (padding read?)")
    return problems


def _layers(indices: Sequence[int]) -> str:
    return f"layer{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
