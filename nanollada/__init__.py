__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    "A chapter's module, imported when it is first named."
    from importlib import import_module, util
    if name.startswith("_") or util.find_spec(f"nanollada.{name}") is None:
        raise AttributeError(f"module 'nanollada' has no attribute {name!r}")
    return import_module(f"nanollada.{name}")
