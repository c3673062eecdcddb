"""The reference reader, found by its path: it is a script beside the specification, no part of the package."""

from __future__ import annotations

import sys

from tests.spec.document import SPEC

sys.path.insert(0, str(SPEC))

import reference_reader

DTYPES = reference_reader.DTYPES
PLANES = reference_reader.PLANES
Refused = reference_reader.Refused
aligned = reference_reader.aligned
load_section = reference_reader.load_section
need = reference_reader.need
open_directory = reference_reader.open_directory
read = reference_reader.read
read_values = reference_reader.read_values
value_fields = reference_reader.value_fields
