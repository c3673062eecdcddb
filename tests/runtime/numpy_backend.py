"""The Backend protocol over the specification's own program: f64 numpy, which shares no code with the runtime.

It keeps no keys and values: every call runs the whole sequence again.
"""

import numpy as np

from rkf.errors import UsageError
from rkf.model.metadata import ModelMetadata
from rkf.runtime.backend import checked
from tests.format.first_form_metadata import metadata_of
from tests.spec.reference import reference_program

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class NumpySequence:
    """The ids of a sequence."""

    def __init__(self, capacity):
        self.capacity, self.ids = capacity, []

    @property
    def length(self):
        return len(self.ids)

    def truncate(self, tokens):
        if not 0 <= tokens <= self.length:
            raise UsageError(f"cannot keep {tokens} of {self.length} tokens")
        del self.ids[tokens:]

    rewinds = takes_back = True

    def fork(self):
        other = NumpySequence(self.capacity)
        other.ids = self.ids.copy()
        return other

    def growth_bytes(self, tokens):
        return 0

    def mark(self):
        pass

    def reusable(self, tokens):
        return min(tokens, self.length)


class NumpyBackend:
    """config: the numbers of a 1.0 file; weights: its tensors by name, the head tied to the embedding where there is
    none.
    """

    pass_tokens, held_bytes = 256, 0

    def __init__(self, config, weights):
        self._weights = {HEAD: weights.get(EMBEDDING), **weights}
        self.metadata = ModelMetadata.of_first_form(metadata_of(config), self._weights)
        self._program = self.metadata.program.to_metadata()

    def new_sequence(self, capacity):
        return NumpySequence(capacity)

    def forward(self, rows, wanted="last"):
        places, found = checked(rows, wanted, self.metadata.vocab_size), []
        for sequence, tokens in rows:
            sequence.ids += tokens.tolist()
            logits = reference_program.run_program(
                self._program, self._weights, sequence.ids, positions=sequence.length
            )
            found.append(logits[-len(tokens) :])
        return np.concatenate(found)[places].astype(np.float32)
