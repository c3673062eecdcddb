"""Run by torchrun in several processes: the logits of models that they share, written by the first one.

Arguments: a file of ids, then .rkf files; FILE.npy gets f32[tokens, vocab], FILE.bytes what one process holds.
"""

import os
import sys
from pathlib import Path

import numpy as np

import rkf
from rkf.runtime import torch_parallel
from rkf.runtime.backend import Row
from rkf.runtime.torch_backend import TorchBackend

ids = np.load(sys.argv[1])
torch_parallel.join("cpu")
if torch_parallel.agreed(int(os.environ["RANK"]) + 5) != 5:
    raise SystemExit("the processes do not agree")
for path in map(Path, sys.argv[2:]):
    with rkf.open(path) as container:
        backend = TorchBackend(container, parallel=True)
        sequence = backend.new_sequence(len(ids))
        found = [backend.forward([Row(sequence, part)], "all") for part in np.split(ids, [40, 41])]
        held = sum(tensor.nbytes for tensor in backend._decoder.state_dict().values())
        if torch_parallel.is_first():
            np.save(path.with_suffix(".npy"), np.concatenate(found))
            path.with_suffix(".bytes").write_text(str(held))
torch_parallel.leave()
