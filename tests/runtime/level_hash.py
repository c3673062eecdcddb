"""Run in a subprocess with RKF_CPU set: print a hash of all logits of a model file, fed in tiles and token by token,
over more than a page of the cache.
"""

import hashlib
import sys

import numpy as np

import rkf
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend

IDS = np.random.Generator(np.random.Philox(key=9)).integers(0, 400, 330)

if __name__ == "__main__":
    digest = hashlib.sha256()
    with rkf.open(sys.argv[1]) as container:
        backend = CpuBackend(container)
        sequence = backend.new_sequence(512)
        for part in [IDS[:5], IDS[5:14], IDS[14:320], *np.split(IDS[320:], 10)]:
            digest.update(backend.forward([Row(sequence, part)], "all").tobytes())
    print(digest.hexdigest())
