"""Matrices clustered on a Ray cluster, one a task, into the bytes of one process. Needs the extra `ray`.

The driver reads the checkpoint, calibrates, and writes the file. A task gets a matrix and gives back its stored form,
so the machines share no files. Ray runs a task again, up to three times, whose worker or machine is lost.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from rkf import __version__
from rkf.cluster.clustering import Clustered, cluster_alike
from rkf.cluster.compensate import Objectives
from rkf.cluster.recipe import Rule
from rkf.errors import RkfError, UsageError
from rkf.format.matrix import DenseTensor

try:
    import ray
except ModuleNotFoundError as error:
    raise UsageError("this needs ray, which is not installed: pip install 'rkf-llm[ray]'") from error

_VERSIONS = f"rkf {__version__}, numpy {np.__version__}, numba {numba.__version__}"  # all of them decide about bytes


class RayMachines:
    """A Ray cluster in use. machines, cpus: how many it has now."""

    def __init__(self) -> None:
        alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        self.machines = max(len(alive), 1)
        self.cpus = max(int(sum(node["Resources"]["CPU"] for node in alive)), 1)
        self._task = ray.remote(num_cpus=1)(_clustered)

    def cluster_alike(
        self,
        tensors: Sequence[tuple[DenseTensor, Rule, str]],
        objective: Objectives | None = None,
        exact_rows: NDArray[np.int64] | None = None,
        each: Callable[..., Iterable[Any]] = map,
    ) -> list[Clustered]:
        """`rkf.cluster.clustering.cluster_alike` as a task. Calibrated stacks of experts stay in this process, where
        the inputs of each expert are.
        """
        if callable(objective):
            return cluster_alike(tensors, objective, exact_rows, each)
        try:
            found = ray.get(self._task.remote(_VERSIONS, list(tensors), objective, exact_rows))
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RkfError(f"ray: {', '.join(name for _, _, name in tensors)}: the task failed: {reason}") from None
        if isinstance(found, RkfError):
            raise found
        done: list[Clustered] = found
        return done


@contextmanager
def ray_machines(address: str) -> Iterator[RayMachines]:
    """The cluster at an address: "auto", HOST:PORT, or ray://HOST:PORT. UsageError: no cluster answers."""
    joined = not ray.is_initialized()  # otherwise the caller has joined one, and stays in it
    if joined:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"ray {address}: {_why_not(error)}") from None
    try:
        yield RayMachines()
    finally:
        if joined:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nobody listens at HOST:PORT: Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _why_not(error: Exception) -> str:
    """Why a cluster cannot be joined, and what to do. Ray tells of a token only inside a traceback, as text."""
    if "InvalidAuthToken" in f"{error}{error.__cause__}":
        return "the cluster asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a copy of its own"
    reason = str(error).strip().partition("\n")[0]
    return f"no cluster answers ({reason}): `ray start --head` starts one"


def _clustered(
    versions: str,
    tensors: Sequence[tuple[DenseTensor, Rule, str]],
    objective: Objectives | None,
    exact_rows: NDArray[np.int64] | None,
) -> list[Clustered] | RkfError:
    """On a worker. An error of rkf is given back, since Ray would put a traceback into its message."""
    if versions != _VERSIONS:
        return UsageError(f"ray: a worker has {_VERSIONS}, this process {versions}: install the same on all machines")
    try:
        return cluster_alike(tensors, objective, exact_rows)
    except RkfError as error:
        return error
