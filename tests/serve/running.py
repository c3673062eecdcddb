"""A server on a loopback port in this process, and plain requests to it."""

import http.client
import json
import threading
import time
from contextlib import contextmanager

from rkf.serve.app import application, listening, server
from rkf.serve.catalogue import Catalogue, EngineOptions
from rkf.serve.guard import local_hosts


@contextmanager
def running(paths, engine_options=None, **options):
    """The port of a server over model files by name."""
    catalogue = Catalogue(paths, {"threads": 1}, engine_options or EngineOptions())
    app = application(catalogue, hosts=local_hosts("127.0.0.1"), **options)
    served = server(app, drain_seconds=10)
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]})
        thread.start()
        while not served.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            served.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def call(port, path, body=None, *, method=None, **headers):
    """(status, JSON) of one request. body: bytes as they are, or what to send as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    if body is not None:
        headers = {"Content-Type": "application/json"} | headers
        body = body if isinstance(body, bytes) else json.dumps(body)
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    response = connection.getresponse()
    found = response.read()
    connection.close()
    return response.status, json.loads(found) if found[:1] in b"{[" and found else found.decode()


def events(port, path, body):
    """The events of a stream, without [DONE], which must be the last."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
    lines = connection.getresponse().read().decode().split("\n\n")
    connection.close()
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def typed_events(port, path, body):
    """The events of a stream whose events have types. Each is named by its type."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
    found = []
    for lines in connection.getresponse().read().decode().split("\n\n")[:-1]:
        name, data = lines.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    connection.close()
    return found
