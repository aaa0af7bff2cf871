"""Layer-wise sparsity for large language models: search the best one, export the pruned model, test it.

The same search as ``layerwise search``, from Python::

    from layerwise import Runtime, Search, search

    result = search(Search(model="demo", sparsity=0.6), Runtime(store="my-store"))
    print(result.selection.verdict, result.pruned)
"""

from typing import TYPE_CHECKING

__all__ = ["Runtime", "Search", "SearchRuntime", "__version__", "search"]

if TYPE_CHECKING:
    from layerwise.flows.runtime import Runtime, SearchRuntime
    from layerwise.flows.search import search
    from layerwise.flows.settings import Search

    __version__: str
else:
    # Loaded when they are first used: they import torch, transformers and Prefect, which takes seconds.
    _MODULES = {
        "Runtime": "runtime",
        "SearchRuntime": "runtime",
        "Search": "settings",
        "search": "search",
    }

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            value = version("layerwise-pruning")
        elif name in _MODULES:
            from importlib import import_module

            value = getattr(import_module(f"layerwise.flows.{_MODULES[name]}"), name)
        else:
            raise AttributeError(f"module 'layerwise' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
