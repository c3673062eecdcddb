"""The references, found by their path: they are scripts beside the specification, no part of the package."""

from __future__ import annotations

import sys

from tests.spec.document import SPEC

sys.path.insert(0, str(SPEC))

import reference_parts
import reference_program
import reference_reader

DTYPES = reference_reader.DTYPES
PLANES = reference_reader.PLANES
Refused = reference_reader.Refused
aligned = reference_reader.aligned
join = reference_parts.join
load_section = reference_reader.load_section
need = reference_reader.need
open_directory = reference_reader.open_directory
read = reference_reader.read
read_values = reference_reader.read_values
value_fields = reference_reader.value_fields
run_program = reference_program.run_program
run = reference_program.run
