"""Image segmentation with plain Vision Transformers for the Hugging Face ecosystem.

Importing the package registers its models with Transformers' Auto classes and image-segmentation pipeline, without
importing PyTorch, so that the command line starts at once: public names are imported on first access, and the models
are registered when Transformers is imported, or now if it has been already.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export.export import export_model
    from .inference.segmenter import Segmenter
    from .models.class_fusion import fuse_class_logits
    from .models.configuration_eomt import EoMTConfig
    from .models.configuration_mask2former_vit import Mask2FormerViTConfig
    from .models.configuration_plain_vit import PlainViTConfig
    from .models.configuration_vit_p import ViTPConfig
    from .models.configuration_vit_p_fusion import ViTPFusionConfig
    from .models.image_processing_eomt import EoMTImageProcessor
    from .models.image_processing_vit_p import ViTPImageProcessor
    from .models.image_processing_vit_p_fusion import ViTPFusionImageProcessor
    from .models.mask2former_annealing import enable_mask_annealing
    from .models.mask_points import points_from_masks
    from .models.modeling_eomt import EoMTForUniversalSegmentation, EoMTModel
    from .models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation, Mask2FormerViTModel
    from .models.modeling_plain_vit import PlainViTModel
    from .models.modeling_vit_p import ViTPForPointClassification, ViTPModel
    from .models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation
else:  # a type checker that saw `__getattr__` would accept any misspelt name

    def __getattr__(name: str) -> Any:
        """Import a public name from auto.py, which imports them all to register the models."""
        # "models", so that `hf_segvit.models.modeling_eomt` works after `import hf_segvit` alone.
        if name not in (*__all__, "auto", "models"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(".auto", __name__)
        # These stand above models/, which auto.py knows only.
        if name == "Segmenter":
            module = import_module(".inference.segmenter", __name__)
        elif name == "export_model":
            module = import_module(".export.export", __name__)
        if name in __all__:
            globals()[name] = getattr(module, name)
        return globals()[name]


__version__ = "0.1.0"

__all__ = [
    "EoMTConfig",
    "EoMTForUniversalSegmentation",
    "EoMTImageProcessor",
    "EoMTModel",
    "Mask2FormerViTConfig",
    "Mask2FormerViTForUniversalSegmentation",
    "Mask2FormerViTModel",
    "PlainViTConfig",
    "PlainViTModel",
    "Segmenter",
    "ViTPConfig",
    "ViTPForPointClassification",
    "ViTPFusionConfig",
    "ViTPFusionForUniversalSegmentation",
    "ViTPFusionImageProcessor",
    "ViTPImageProcessor",
    "ViTPModel",
    "enable_mask_annealing",
    "export_model",
    "fuse_class_logits",
    "points_from_masks",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Registration:
    """A finder on `sys.meta_path` that registers the models once Transformers is imported, and then removes itself.

    It finds nothing itself: it takes the spec that another finder returns, and wraps its loader in `_Loader`.
    """

    def __init__(self) -> None:
        # Modules of models/ that are being imported. They often import Transformers in their first lines; registering
        # at that moment would use them half-initialised, so it waits until there are none. Across threads, too: one
        # that imports Transformers would hold its import lock and wait for a module whose thread waits for that lock.
        self.importing: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec from the other finders, with its loader wrapped, for Transformers and our modules that import it."""
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
        """Register the models if Transformers is imported and no module of ours is still being imported."""
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
    """Another module's loader that, once the module is loaded, registers the models if it is time."""

    def __init__(self, loader: Any, registration: _Registration) -> None:
        self.loader, self.registration = loader, registration

    def __getattr__(self, name: str) -> Any:
        # `importlib.util.find_spec` gives this loader to callers who use its other methods, such as `get_source`.
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # Restored first: `inspect`, `importlib.resources` and the module itself may use its loader.
        module.__spec__.loader = module.__loader__ = self.loader
        importing = self.registration.importing
        is_ours = module.__name__ != "transformers"
        if is_ours:
            importing.append(module.__name__)
        try:
            self.loader.exec_module(module)
        finally:
            if is_ours:
                importing.remove(module.__name__)
        self.registration.register_when_ready()


if sys.modules.get("transformers") is not None:
    import_module(".auto", __name__).register()
elif "_registration" not in globals():  # after `importlib.reload`, the first one is still waiting
    _registration = _Registration()
    sys.meta_path.insert(0, _registration)
