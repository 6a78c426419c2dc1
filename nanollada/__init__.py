__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    "A chapter's module, imported when it is first named."
    from importlib import import_module
    if name.startswith("_"):
        raise AttributeError(name)
    return import_module(f"nanollada.{name}")
