__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    "A chapter's module, imported when it is first named."
    from importlib import import_module, util
    if name.startswith("_") or util.find_spec(f"nanollada.{name}") is None:
        raise AttributeError(f"module 'nanollada' has no attribute {name!r}")
    return import_module(f"nanollada.{name}")


class _WhenLoaded:
    "An import hook: once `transformers` loads its auto classes, now or later, they learn to open a run."
    names = ["transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"]

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> object:
        "The module's own spec, with `nanollada.hub.register` called when it has run; None for all others."
        if name not in cls.names:  # such as importlib itself, which is asked for below
            return None
        from importlib import import_module
        from importlib.machinery import PathFinder
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            def exec_module(module: object, run: object = spec.loader.exec_module) -> None:
                run(module)
                import_module("nanollada.hub").register()
            spec.loader.exec_module = exec_module
        return spec


def _watch() -> None:
    import sys
    sys.meta_path.insert(0, _WhenLoaded)
    if any(name in sys.modules for name in _WhenLoaded.names):
        from nanollada.hub import register
        register()


_watch()
