# SPDX-License-Identifier: MIT
"""Training over several processes: data parallel, and tables that no process holds whole.

================================  ====================================================================================
:class:`DistributedTrainer`       libffm data over processes, as ``torchrun -m ffm_ext train`` runs it
:class:`DistributedDataParallel`  torch's, which here also sums the sparse gradients of this package's layers
:class:`EmbeddingFFM`             an FFM whose tables TorchRec shards; needs the extra ``distributed``
:func:`shard`                     shards it by row, by column or by table, with a fused optimizer
================================  ====================================================================================

FSDP needs nothing from here: ``fully_shard(model)``, with ``grad="dense"``. See docs/distributed.md.
"""

from ._ddp import DistributedDataParallel
from ._share import Share, read_share, share
from ._torchrec import EmbeddingFFM, shard
from ._training import DistributedTrainer

__all__ = [
    "DistributedDataParallel",
    "DistributedTrainer",
    "EmbeddingFFM",
    "Share",
    "read_share",
    "shard",
    "share",
]
