"""Image segmentation with plain Vision Transformers for the Hugging Face ecosystem.

Importing the package makes Transformers' Auto classes and image-segmentation pipeline know its models. Neither that
nor a public name imports PyTorch before it is needed, so that the command line answers at once: names are imported
when they are asked for, and the models are registered when Transformers is imported, or now if it has been.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models.class_fusion import fuse_class_logits
    from .models.configuration_eomt import EoMTConfig
    from .models.configuration_plain_vit import PlainViTConfig
    from .models.configuration_vit_p import ViTPConfig
    from .models.configuration_vit_p_fusion import ViTPFusionConfig
    from .models.image_processing_eomt import EoMTImageProcessor
    from .models.image_processing_vit_p import ViTPImageProcessor
    from .models.image_processing_vit_p_fusion import ViTPFusionImageProcessor
    from .models.mask_points import points_from_masks
    from .models.modeling_eomt import EoMTForUniversalSegmentation, EoMTModel
    from .models.modeling_plain_vit import PlainViTModel
    from .models.modeling_vit_p import ViTPForPointClassification, ViTPModel
    from .models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation
else:  # a type checker that saw this function would take any misspelt name for a public one

    def __getattr__(name: str) -> Any:
        """A public name, from auto.py, which imports them all to register the models."""
        # `hf_segvit.models.modeling_eomt` works after `import hf_segvit`, too, as this imports all of models/.
        if name not in (*__all__, "auto", "models"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        auto = import_module(".auto", __name__)
        if name in __all__:
            globals()[name] = getattr(auto, name)
        return globals()[name]


__version__ = "0.1.0"

__all__ = [
    "EoMTConfig",
    "EoMTForUniversalSegmentation",
    "EoMTImageProcessor",
    "EoMTModel",
    "PlainViTConfig",
    "PlainViTModel",
    "ViTPConfig",
    "ViTPForPointClassification",
    "ViTPFusionConfig",
    "ViTPFusionForUniversalSegmentation",
    "ViTPFusionImageProcessor",
    "ViTPImageProcessor",
    "ViTPModel",
    "fuse_class_logits",
    "points_from_masks",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Registration:
    """A finder on `sys.meta_path` that registers the models once Transformers has been imported, and then leaves.

    It finds nothing itself: it asks the finders behind it, and puts itself in the place of the loader they name, as
    which it imports the module by that loader and then looks whether it is time to register.

    Transformers is often imported by a module of models/ in its first lines. What registers the models would then
    import that half-made module, so registration waits until no module of models/ is being imported. That holds across
    threads, too: the thread that imports Transformers would otherwise keep it locked while it waits for a module of
    ours whose thread waits for Transformers.
    """

    def __init__(self) -> None:
        self.importing: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec that the other finders give, with this loader, for Transformers and what imports it here."""
        if name != "transformers" and not name.startswith((f"{__name__}.models.", f"{__name__}.auto")):
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None and finder is not self else None
            if spec is not None:
                if spec.loader is not None:  # a folder without __init__.py has none
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def register_when_ready(self) -> None:
        """Register, unless Transformers is not there yet or one of our modules is half-made."""
        if self.importing or sys.modules.get("transformers") is None:
            return
        try:
            sys.meta_path.remove(self)
        except ValueError:  # another thread is registering
            return
        try:
            import_module(".auto", __name__).register()
        except BaseException:  # after Ctrl-C in a notebook, the next import tries again
            sys.meta_path.insert(0, self)
            raise


class _Loader:
    """Another loader, and after its work the look whether it is time to register."""

    def __init__(self, loader: Any, registration: _Registration) -> None:
        self.loader, self.registration = loader, registration

    def __getattr__(self, name: str) -> Any:
        # `importlib.util.find_spec` hands specs to people who only look, such as for `get_source`.
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # The module is to look as if nobody had been in between.
        module.__spec__.loader = module.__loader__ = self.loader
        importing = self.registration.importing
        ours = module.__name__ != "transformers"
        if ours:
            importing.append(module.__name__)
        try:
            self.loader.exec_module(module)
        finally:
            if ours:
                importing.remove(module.__name__)
        self.registration.register_when_ready()


if sys.modules.get("transformers") is not None:
    import_module(".auto", __name__).register()
elif "_registration" not in globals():  # `importlib.reload` finds the one that still waits
    _registration = _Registration()
    sys.meta_path.insert(0, _registration)
