"""One of two gloo processes: `train_worker.py CONFIG ddp|fsdp2 [--resume]`, run by torchrun."""

import os
import sys


def main() -> None:
    config, kind, *words = sys.argv[1:]
    if kind == "fsdp2":
        shard_on_the_cpu()
    from mlpool.training.train import train

    train(config, resume="--resume" in words)


def shard_on_the_cpu() -> None:
    """What configs/accelerate/fsdp2.yaml says, as accelerate launch would put it, for processes without a GPU.

    accelerate offers FSDP to accelerators alone, so the processes are declared to be such; torch's FSDP2 runs on CPUs.
    """
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer",
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
        FSDP_OFFLOAD_PARAMS="false",
    )
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    # Declared an accelerator, the CPU has a number, and torch 2.11 saves it as "cpu:0", which it cannot read.
    torch.serialization.register_package(0, lambda _: None, lambda storage, at: storage if at == "cpu:0" else None)

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


if __name__ == "__main__":
    main()
