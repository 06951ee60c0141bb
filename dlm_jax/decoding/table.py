"""Tables of classes by name that know where a class is without importing it.

So a command can list what there is without waiting for JAX, and a new class is one line.
"""

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Table(MutableMapping[str, T], Generic[T]):
    """Name -> class; a class is imported when it is first asked for."""

    def __init__(self, package: str, places: dict[str, str]) -> None:
        """Imports nothing.

        Args:
          package: where the modules are.
          places: name of each class for users -> `module.Class` in the package.
        """
        self._package = package
        self._places = places
        self._found: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._found:
            found = self.load(self._places[name])
            if found.name != name:
                raise ValueError(f"{self._places[name]} is called {found.name!r}, not {name!r}.")
            self._found[name] = found
        return self._found[name]

    def __setitem__(self, name: str, found: T) -> None:
        self._places[name], self._found[name] = "", found

    def __delitem__(self, name: str) -> None:
        del self._places[name]
        self._found.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def load(self, place: str) -> Any:
        """The class at `module.Class`."""
        module, _, name = place.rpartition(".")
        return getattr(importlib.import_module(f"{self._package}.{module}"), name)

    def export(self, name: str, others: dict[str, str]) -> Any:
        """For a package's `__getattr__`: a class of the table, or one of `others`, by its own name.

        Raises:
          AttributeError: there is none.
        """
        exported = {place.rpartition(".")[2]: place for place in self._places.values()} | others
        if name not in exported:
            raise AttributeError(f"module {self._package!r} has no attribute {name!r}")
        return self.load(exported[name])
