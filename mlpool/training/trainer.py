"""sentence-transformers' trainer, where it would lose something of an embedder: checkpoints, sharding, resume."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import AutoModel

from ..embedder.adapters import has_adapter
from ..embedder.embedder import Embedder
from ..embedder.folder import check_folder
from ..pooling.base import WEIGHTS_NAME
from ..quantized import is_quantized
from ..show import some
from ..taps import find_layers
from .mini_batches import TokenCounts

STATE = "trainer_state.json"  # the last file of a checkpoint that transformers writes


class EmbedderTrainer(SentenceTransformerTrainer):
    """A `SentenceTransformerTrainer` for embedders.

    What differs: the model is prepared by `prepare`; a checkpoint is written whole or not at all, and by all processes
    in step; weights sharded by FSDP2 are gathered to be saved and spread again to resume; resuming reads trained
    weights in the precision they were trained in, makes no step behind the last, and goes on in the order of its epoch;
    a loss or a gradient that is not finite ends the training before it reaches the weights; what padding costs is
    logged, as `computed_per_token`: tokens computed over tokens of text, 1 where nothing is padded.
    """

    def __init__(self, model: Embedder, **kwargs: Any) -> None:
        prepare(model)
        super().__init__(model=model, **kwargs)
        self._losses: list[torch.Tensor] = []  # of the batches of this step
        self._logged = TokenCounts()

    def _run_epoch(self, model: nn.Module, epoch: int, train_dataloader: Any, *args: Any, **kwargs: Any) -> None:
        # transformers ends only after a step: one too many where a run goes on from its last.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        self._set_epoch(train_dataloader, epoch)
        super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _set_epoch(self, loader: Any, epoch: int) -> None:
        """Tell the sampler beneath whatever wraps it which epoch it is, so that the order is of seed and epoch alone.

        transformers reaches through one wrapper, and a resumed run of several processes has two: it would go on in the
        order of the first epoch. And a generator would be where this process left it, or at the seed where it resumed.
        """
        sampler = loader.batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        if getattr(sampler, "generator", None) is not None:
            sampler.generator.manual_seed(self.args.seed + epoch)

    def validate_column_names(self, dataset: Any, dataset_name: str | None = None) -> None:
        """A mixed set says in a column of sentence-transformers' own which source a row is of."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With what padding cost since the last time, and at the end over all."""
        counts = getattr(self.loss, "counts", None)
        if isinstance(counts, TokenCounts) and ("loss" in logs or "train_loss" in logs):
            before = TokenCounts() if "train_loss" in logs else self._logged
            here = torch.tensor([counts.computed - before.computed, counts.text - before.text], dtype=torch.float32)
            computed, text = self.accelerator.reduce(here.to(self.args.device)).tolist()
            self._logged = dataclasses.replace(counts)
            if text:
                logs = {**logs, "computed_per_token": round(computed / text, 4)}
        super().log(logs, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._losses.append(super().training_step(*args, **kwargs))
        return self._losses[-1]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called by transformers once a step, with all gradients there and before the optimizer uses them."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses, self._losses = torch.stack(self._losses).float(), []
        self._check_finite(model, losses, norm)
        return norm

    def _check_finite(self, model: nn.Module, losses: torch.Tensor, norm: Any) -> None:
        """Raises ValueError, on all processes at once, where a loss of the step or its gradient is not finite."""
        norm = torch.as_tensor(0.0 if norm is None else norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        values = torch.cat([losses, norm.to(losses).reshape(1)])
        wrong = ~values.isfinite()
        # A scaled gradient overflows now and then: the scaler skips such a step and lowers the scale.
        wrong[-1] &= self.accelerator.scaler is None
        somewhere = wrong.any().float()
        if dist.is_initialized():
            dist.all_reduce(somewhere, op=dist.ReduceOp.MAX)
        if not somewhere:
            return
        found = "the loss of another process is not finite"
        if wrong[:-1].any():
            found = f"the loss is {values[wrong][0].item()}{_wrong_texts(self.loss)}"
        elif wrong[-1]:
            found = f"the norm of the gradient is {norm.item()}{_first_wrong(model)}"
        last = last_checkpoint(str(self.args.output_dir))
        kept = f"the last good weights are in {last}" if last else "no checkpoint was written before (save_steps)"
        raise ValueError(
            f"training diverged at step {self.state.global_step + 1}: {found}. The step was not made, and {kept}. "
            "Lower learning_rate or pooler_learning_rate, warm up longer, or look at the data of this step"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the embedder, verified; every process returns when the folder is there."""
        if self.is_fsdp_enabled:
            # Asked of all processes; the first has the tensors.
            state = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            with whole(self.model, dict(state)):
                self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)
        # The others write their random states into the folder that the first is about to put in place.
        if dist.is_initialized():
            dist.barrier()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # transformers asks every process since 5.0, sentence-transformers expects the first alone.
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        embedder: Any = getattr(self.model, "_orig_mod", self.model)
        state = trained_weights(embedder, Path(resume_from_checkpoint))
        if self.is_fsdp_enabled:
            set_model_state_dict(embedder, state, options=StateDictOptions(full_state_dict=True, strict=False))
        else:
            embedder.load_state_dict(state, strict=False)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _first_wrong(model: nn.Module) -> str:
    """Which parameter's gradient is not finite, where not all are: clipping by a norm of nan makes all so."""
    found = {n: bool(p.grad.isfinite().all()) for n, p in model.named_parameters() if p.grad is not None}
    wrong = [name for name, finite in found.items() if not finite]
    return f" (first in {wrong[0]})" if 0 < len(wrong) < len(found) else ""


def _wrong_texts(loss: Any) -> str:
    """Which texts of the last batch have embeddings that are not finite."""
    embeddings: torch.Tensor | None = getattr(loss, "embeddings", None)
    if embeddings is None:
        return ""
    finite = embeddings.isfinite().all(-1)
    if finite.all() or not finite.any():
        return ""
    places = (~finite).nonzero().tolist()
    rows = some([f"row {row} of column {column}" for column, row in places], 5)
    return f", the embedding of {rows} of the batch (from 0) is NaN or infinite"


def prepare(embedder: Embedder) -> None:
    """Make an embedder ready for training, in place.

    Trainable weights become float32, since an optimizer's steps are lost in half precision; an adapter that was loaded
    becomes trainable; and what cannot get a gradient is frozen, which DDP would wait for: an encoder's unused pooler
    and layers above the highest that is read.

    Raises:
        ValueError: a quantised base of which more than an adapter is to be trained: its codes have no gradient.
    """
    backbone = embedder.backbone
    trunk, layers = find_layers(backbone.model)
    if is_quantized(trunk) and not has_adapter(backbone.model) and any(p.requires_grad for p in trunk.parameters()):
        raise ValueError(
            "a quantised base cannot be trained itself: put LoRA on it (lora: true in a config, add_lora(embedder)), "
            "or freeze it (embedder[0].requires_grad_(False)) to train the pool alone"
        )
    for name, parameter in backbone.model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    if isinstance(getattr(trunk, "pooler", None), nn.Module):
        trunk.pooler.requires_grad_(False)
    highest = max(i % len(layers) for i in backbone.layers) if backbone.layers is not None else len(layers) - 1
    for layer in list(layers)[highest + 1 :]:
        layer.requires_grad_(False)
    if highest < len(layers) - 1 or not backbone.reads_final_norm:
        for name, module in trunk.named_children():
            if "norm" in name or name == "ln_f":
                module.requires_grad_(False)
    for parameter in embedder.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    backbone.arrange()


def trained_weights(embedder: Embedder, checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds of this embedder's weights, under their names in it: pool, and adapter or all weights."""
    check_folder(checkpoint)
    state: dict[str, Any] = {}
    for path in checkpoint.glob(f"*/{WEIGHTS_NAME}"):
        state |= {f"pooler.pool.{name}": tensor for name, tensor in load_file(path).items()}
    if has_adapter(embedder.backbone.model):
        adapter = load_file(checkpoint / "adapter_model.safetensors")
        for name, tensor in adapter.items():
            stem, kind, rest = name.removeprefix("base_model.model.").rpartition(".weight")
            state[f"backbone.model.{stem}.default{kind}{rest}"] = tensor
    else:
        full = AutoModel.from_pretrained(checkpoint, dtype="auto")
        state |= {f"backbone.model.{name}": tensor for name, tensor in full.state_dict().items()}
    names = set(embedder.state_dict())
    if unknown := [name for name in state if name not in names]:
        raise ValueError(
            f"{checkpoint} does not fit the model being trained: it has {', '.join(unknown[:3])}, which the model "
            "lacks; resume with the config it was trained with"
        )
    return state


@contextmanager
def whole(model: nn.Module, state: dict[str, Any]) -> Iterator[None]:
    """While it lasts, the model's sharded parameters are the full tensors of `state`."""
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in state}
    sharded: dict[str, nn.Parameter] = {}
    for name, owner in owners.items():
        leaf = name.rpartition(".")[2]
        if leaf in owner._parameters:
            sharded[name] = owner._parameters[leaf]  # type: ignore[assignment]
            owner._parameters[leaf] = nn.Parameter(state[name], requires_grad=False)
    try:
        yield
    finally:
        for name, parameter in sharded.items():
            owners[name]._parameters[name.rpartition(".")[2]] = parameter


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; one that a killed run left half is passed over."""
    found = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2] or 0))
    for path in reversed(found):
        with suppress(OSError, ValueError):
            json.loads((path / STATE).read_text())
            check_folder(path)
            return path
    return None
