"""The real default model: fetched once into the user's cache, converted once per test run."""

import pytest

import rkf
from rkf.commands.default_model import NAME
from rkf.converters.pull import pull


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/real" in item.nodeid:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def checkpoint():
    """The path of the checkpoint."""
    return pull(NAME)


@pytest.fixture(scope="session")
def converted(checkpoint, tmp_path_factory):
    """A function that returns the file for a recipe and K, made once each."""
    folder, made = tmp_path_factory.mktemp("real"), {}

    def make(recipe=None, k=None):
        if (recipe, k) not in made:
            made[recipe, k] = folder / f"{recipe}-{k}.rkf"
            rkf.convert(checkpoint, made[recipe, k], recipe=recipe, k=k)
        return made[recipe, k]

    return make
