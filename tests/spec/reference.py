"""The reference reader, found by its path: it is a script beside the specification, no part of the package."""

from __future__ import annotations

import sys

from tests.spec.document import SPEC

sys.path.insert(0, str(SPEC))

import reference_reader

Refused = reference_reader.Refused
open_directory = reference_reader.open_directory
load_section = reference_reader.load_section
read = reference_reader.read
