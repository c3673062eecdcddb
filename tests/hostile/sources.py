"""The vectors that hostile files are made from, by the names that cases use."""

from __future__ import annotations

SOURCES = {
    **{"everything": "everything.rkf", "zstd": "zstd.rkf", "regrouped": "regrouped.rkv"},
    **{name: f"program-{name}.rkf" for name in ("experts", "latent", "plain", "recurrent", "scan", "windows")},
}
