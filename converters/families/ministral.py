"""ministral: a mistral whose layer_types gives the window to some layers; the reference saves one under this name."""

from __future__ import annotations

from dataclasses import replace

from rkf.converters.families import mistral

FAMILY = replace(mistral.FAMILY, name="ministral", class_name="MinistralForCausalLM", wrapper=None)
