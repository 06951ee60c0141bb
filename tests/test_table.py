"""Tables of classes by name."""

import subprocess
import sys

import pytest

from dlm_jax import cache
from dlm_jax.decoding import strategies
from dlm_jax.decoding.table import Table

TABLES = [cache.METHODS, strategies.STRATEGIES]


@pytest.mark.parametrize("table", TABLES, ids=["caches", "strategies"])
def test_every_name_is_that_of_its_class(table):
    assert len(table) == len(list(table)) == len({*table.values()}) > 7
    for name, found in table.items():
        assert found.name == name and table[name] is found


def test_a_wrong_line_is_told():
    table = Table("dlm_jax.cache", {"dual": "fast_dllm.Prefix"})
    with pytest.raises(ValueError, match="fast_dllm.Prefix is called 'prefix', not 'dual'"):
        table["dual"]


def test_classes_are_exported_by_their_names():
    assert cache.Dual is cache.METHODS["dual"]
    assert issubclass(strategies.Threshold, strategies.Rule)
    for package in (cache, strategies):
        assert all(hasattr(package, name) for name in package.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
            package.Nothing  # noqa: B018 (asking is the point)


def test_names_are_known_without_importing_jax():
    code = (
        "import sys\nfrom dlm_jax import cache\nfrom dlm_jax.decoding import strategies\n"
        "assert 'dual' in cache.METHODS and 'klass' in strategies.STRATEGIES\n"
        "assert not {'jax', 'numpy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
