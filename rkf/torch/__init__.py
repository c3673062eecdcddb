"""rkf files in torch: layers with frozen ranks and trainable values. torch is an extra (`rkf-llm[torch]`).

`ClusteredLinear` and `ClusteredEmbedding` replace `nn.Linear` and `nn.Embedding`; `load_into` loads a whole file into a
transformers model.
"""

from __future__ import annotations

from rkf.errors import UsageError

try:
    import torch as _torch
except ModuleNotFoundError as error:
    raise UsageError("this needs torch, which is not installed: pip install 'rkf-llm[torch]'") from error

from rkf.torch.clustered_layers import ClusteredEmbedding, ClusteredLinear, ClusteredStack
from rkf.torch.loading import load_into
from rkf.torch.weight import ClusteredWeight

__all__ = ["ClusteredEmbedding", "ClusteredLinear", "ClusteredStack", "ClusteredWeight", "load_into"]

del _torch
