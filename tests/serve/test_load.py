"""Load in short form: every kind of request at once, schemas, malformed requests, bad clients, and nothing left behind.

load.py has the long form, and docs/log.md its figures.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

import rkf
from rkf.runtime.kv_cache import CacheLayout
from rkf.serve.catalogue import EngineOptions
from tests.runtime import tiny
from tests.serve import load
from tests.serve.running import call, running
from tests.serve.schemas import SCHEMAS

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with load.served(tmp_path_factory.mktemp("load")) as found:
        load.mixed(found, 60)  # after which everything that is allocated once is there
        yield found


@pytest.mark.parametrize(
    "work",
    [
        lambda server: load.mixed(server, 60),
        lambda server: load.against_schemas(server, len(SCHEMAS)),
        lambda server: load.malformed(server, 300),
        lambda server: load.bad_clients(server, 8),
    ],
    ids=["mixed", "schemas", "malformed", "bad clients"],
)
def test_everything_is_answered_and_nothing_is_left(server, work):
    before = server.left()
    work(server)
    after = server.left(before.handles + 3)
    assert after.resident_mib - before.resident_mib < 16  # of 150
    assert after.handles <= before.handles + 3
    assert after.cache_bytes <= before.cache_bytes


def test_a_system_prompt_of_2000_tokens_is_computed_once_and_held_once(tmp_path):
    config = tiny.config(context_length=4096)
    path = tiny.write(tmp_path / "m.rkf", config, tiny.weights(config))
    with rkf.open(path) as container:
        page_bytes = CacheLayout(container.model.program, "int16").groups[0].page_bytes
    system = "The capital of France is Paris, and the river that runs through it is the Seine. " * 115

    def ask(number):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": f"Question {number}?"}]
        return call(port, CHAT, {"model": "m", "messages": messages, "max_tokens": 8})[1]["usage"]

    def held():
        text = call(port, "/metrics")[1]
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith("rkf_cache_bytes ")))

    with running({"m": path}, EngineOptions(parallel=8)) as port, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
        lengths = [each["prompt_tokens"] for each in found]
        computed = sum(each["prompt_tokens"] - each["prompt_tokens_details"]["cached_tokens"] for each in found)
        assert min(lengths) > 2000
        assert computed < max(lengths) + 8 * 40
        assert held() <= (max(lengths) // 256 + 8) * page_bytes  # the last page is each one's own
