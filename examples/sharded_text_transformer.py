r"""The language model of bytes, sharded inside each machine, with PowerSGD between machines.

One machine with four processes stands in for two machines with two devices each:

    python examples/sharded_text_transformer.py fit --trainer.devices 4 \
        --trainer.strategy PowerSGDModelParallelStrategy --trainer.strategy.replicas 2 --trainer.strategy.rank 8

On real machines, one command on each, and one replica a machine is the default:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/sharded_text_transformer.py fit --trainer.accelerator gpu --trainer.devices 8 --trainer.num_nodes 2 \
        --trainer.strategy PowerSGDModelParallelStrategy --trainer.strategy.rank 8
"""

from __future__ import annotations

from image_classification import run_command_line
from text_transformer import ByteTransformer, TextDataModule
from torch.distributed.fsdp import FSDPModule, fully_shard


class ShardedByteTransformer(ByteTransformer):
    """The transformer, of which each device of a machine holds a part."""

    def configure_model(self) -> None:
        if isinstance(self, FSDPModule):
            return  # Lightning calls this before a test, too
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)


if __name__ == "__main__":
    run_command_line(
        ShardedByteTransformer,
        TextDataModule,
        {"max_epochs": 3, "gradient_clip_val": 1.0, "strategy": "powersgd_model_parallel"},
    )
