"""A tiny clustered model to study, and a text."""

from functools import cache

import pytest

from rkf.cluster.recipe import Rule
from tests.runtime import tiny
from tests.runtime.files import write_model

CONFIG = tiny.config(context_length=48)
TEXT = "\n".join(tiny.CORPUS) * 4


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.rkf"
    return write_model(path, CONFIG, tiny.weights(CONFIG), Rule(k=8, exceptions=0.01))


@pytest.fixture(scope="session")
def study(model):
    """`rkf.study.study` on the tiny model."""

    def run(name, out, **options):
        from rkf.study import study

        return study(name, model, out, **{"text": TEXT, "seeds": 1, "windows": 1, "ctx": 32, "threads": 1, **options})

    return run


@pytest.fixture(scope="session")
def studied(tmp_path_factory, study):
    """Study name -> the folder of its results with two seeds."""

    @cache
    def folder(name):
        out = tmp_path_factory.mktemp(name)
        study(name, out, seeds=2)
        return out

    return folder
