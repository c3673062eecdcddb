"""Replicas of the server on the machines of a Ray cluster, by Ray Serve. Needs the extra `ray`.

    serve run rkf.serve.replicas:replicas models=/models/m.rkf replicas=4 cpus=16

Each replica is the whole server with its own engines; Ray Serve sends a request to the less busy of two. So a chat's
next turn may reach a replica that must compute its beginning again.
"""

from pathlib import Path  # no `annotations` from __future__: Ray Serve reads the class of `options` and makes it

from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette

from rkf.errors import UsageError
from rkf.serve.app import application
from rkf.serve.catalogue import Catalogue, EngineOptions, named

try:
    from ray import serve
except ImportError as error:
    raise UsageError("this needs ray, which is not installed: pip install 'rkf-llm[ray]'") from error


class ReplicaOptions(BaseModel):
    """Arguments of `serve run`, KEY=VALUE each.

    models: files, separated by commas, at the same paths on every machine. cpus: of a replica, and its threads. ctx,
    parallel, queue: as of `rkf serve`. api_key_file: a file with one key per line. drain: seconds to finish requests.
    """

    model_config = ConfigDict(extra="forbid")

    models: str
    replicas: int = Field(1, ge=1)
    cpus: int = Field(1, ge=1)
    ctx: int | None = Field(None, ge=2)
    parallel: int = Field(16, ge=1, le=1024)
    queue: int = Field(256, ge=0)
    api_key_file: Path | None = None
    drain: int = Field(30, ge=0)


def replicas(options: ReplicaOptions) -> serve.Application:
    """The application for `serve run rkf.serve.replicas:replicas KEY=VALUE…`, or `ray.serve.run(replicas(…))`."""
    paths = named([Path(path) for path in options.models.split(",")])
    keys = [] if options.api_key_file is None else options.api_key_file.read_text("utf-8").split()

    def build() -> Starlette:
        engines = EngineOptions(options.ctx, options.parallel, options.queue)
        catalogue = Catalogue(paths, {"threads": options.cpus}, engines)
        catalogue.load(next(iter(paths)))
        return application(catalogue, keys=keys)

    deployment = serve.deployment(
        name="rkf",
        num_replicas=options.replicas,
        # What Ray Serve sends to a replica at once: as many as its engine takes, or requests would run one by one.
        max_ongoing_requests=options.parallel + options.queue,
        ray_actor_options={"num_cpus": options.cpus},
        graceful_shutdown_timeout_s=options.drain,
    )(serve.ingress(build)())
    return deployment.bind()
