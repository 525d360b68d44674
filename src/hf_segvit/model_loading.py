"""Loading a model to use it: the model and its image processor, or one sentence that says why not.

`from_pretrained` is lenient: weights that a checkpoint lacks become random, NaN loads as any number, and a missing
network shows as whatever the last layer of the client raised. Here each of these is a `ValueError` with a remedy.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.utils import logging

from .models.configuration_eomt import EoMTConfig
from .models.configuration_vit_p import ViTPConfig
from .models.configuration_vit_p_fusion import ViTPFusionConfig
from .models.image_processing_eomt import EoMTImageProcessor
from .models.image_processing_vit_p import ViTPImageProcessor
from .models.image_processing_vit_p_fusion import ViTPFusionImageProcessor
from .models.modeling_eomt import EoMTForUniversalSegmentation
from .models.modeling_vit_p import ViTPForPointClassification
from .models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation
from .models.transformers_eomt import TRANSFORMERS_EOMT_TYPES

SEGMENTATION_TYPES = (EoMTConfig.model_type, *TRANSFORMERS_EOMT_TYPES)


def load_segmentation_model(
    source: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[EoMTForUniversalSegmentation, EoMTImageProcessor]:
    """Load a checkpoint of this package, or of Transformers' own `eomt` or `eomt_dinov3`, for inference.

    Args:
        source: a folder, or the id of a Hub repository.
        revision: branch, tag or commit of the repository.
        dtype: of the weights.

    Returns:
        The model, in evaluation mode on the CPU, and its image processor.

    Raises:
        ValueError: the source is not there or cannot be reached, is of another type, is damaged or lacks weights, or a
            weight is not finite; the message names the source, what is wrong and the remedy.
    """
    model = _load_model(EoMTForUniversalSegmentation, SEGMENTATION_TYPES, "segments", source, revision, dtype)
    return model, _load_processor(EoMTImageProcessor, source, revision)


def load_point_classifier(
    source: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[ViTPForPointClassification, ViTPImageProcessor]:
    """Load a ViT-P checkpoint of this package for inference.

    Args:
        source: a folder, or the id of a Hub repository.
        revision: branch, tag or commit of the repository.
        dtype: of the weights.

    Returns:
        The model, in evaluation mode on the CPU, and its image processor.

    Raises:
        ValueError: as for `load_segmentation_model`.
    """
    types = (ViTPConfig.model_type,)
    model = _load_model(ViTPForPointClassification, types, "classifies points", source, revision, dtype)
    return model, _load_processor(ViTPImageProcessor, source, revision)


def load_fused_checkpoint(
    source: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[ViTPFusionForUniversalSegmentation, ViTPFusionImageProcessor]:
    """Load a checkpoint of a generator and a ViT-P joined, for inference.

    Args:
        source: a folder, or the id of a Hub repository.
        revision: branch, tag or commit of the repository.
        dtype: of the weights.

    Returns:
        The model, in evaluation mode on the CPU, and its image processor.

    Raises:
        ValueError: as for `load_segmentation_model`.
    """
    types = (ViTPFusionConfig.model_type,)
    model = _load_model(ViTPFusionForUniversalSegmentation, types, "segments", source, revision, dtype)
    return model, _load_processor(ViTPFusionImageProcessor, source, revision)


def _load_model(
    cls: Any, types: Sequence[str], purpose: str, source: str, revision: str | None, dtype: torch.dtype
) -> Any:
    refuse_missing_folder(source)
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        model_type = settings.get("model_type")
        if model_type not in types:
            raise ValueError(
                f"{source} is a model of type {model_type!r}; this command {purpose} with those of type "
                f"{', '.join(types)}"
            )
        with quiet_transformers():
            model, report = cls.from_pretrained(
                source,
                revision=revision,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, with names and sizes
                output_loading_info=True,
            )
    except OSError as error:
        raise ValueError(f"cannot load {source}: {_reason(source, error)}") from error
    except SafetensorError as error:
        raise ValueError(f"cannot load {source}: its weights are damaged ({error}); copy or save it again") from error
    _refuse_incomplete_weights(source, report)
    refuse_non_finite_weights(model, source)
    return model.eval()


def refuse_non_finite_weights(model: torch.nn.Module, source: str) -> None:
    """Refuse a model with NaN or infinity in its weights, whose every answer would be empty or senseless.

    Raises:
        ValueError: naming the tensors.
    """
    broken = [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        more = f" and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise ValueError(
            f"{source}: NaN or infinity in {broken[0]}{more}; its training diverged or the file is damaged, so take an "
            "earlier checkpoint or copy it again"
        )


def _load_processor(cls: Any, source: str, revision: str | None) -> Any:
    try:
        return cls.from_pretrained(source, revision=revision or "main")
    except OSError as error:
        if "JSON" in str(error):
            raise ValueError(f"cannot load {source}: {_reason(source, error)}") from error
        raise ValueError(
            f"cannot load {source}: no preprocessor_config.json, the settings of its image processor; save it there "
            "with processor.save_pretrained(folder)"
        ) from error


def _refuse_incomplete_weights(source: str, report: dict[str, Any]) -> None:
    """Refuse what `from_pretrained` would make up: weights that are missing or of another size become random."""
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise ValueError(
            f"{source}: {name} has shape {tuple(found)}, but {tuple(expected)} by its config.json: they are of "
            "different models; save model and configuration together with model.save_pretrained(folder)"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of the model's weights, first {missing[0]}: it is no complete model "
            "of its type; train it, or copy it again"
        )


def refuse_missing_folder(source: str) -> None:
    """Refuse at once what is no folder of a model, and no id that the Hub could know either.

    Raises:
        ValueError: saying which it is.
    """
    path = Path(source)
    if path.is_file():
        raise ValueError(f"{source} is a file; name the folder that holds config.json and model.safetensors")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{source} holds no config.json; name the folder that save_pretrained or training wrote")
    elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1 or "\\" in source:
        raise ValueError(f"there is no folder {source}, and a Hub id looks like owner/name; check the path")


def _reason(source: str, error: OSError) -> str:
    """What lies behind an OSError of `from_pretrained`, and the remedy."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)

    def caused_by(kind: type) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if caused_by(GatedRepoError):
        return f"access is restricted; ask for it at https://huggingface.co/{source} and log in with `hf auth login`"
    if caused_by(RevisionNotFoundError):
        return "the Hub repository has no such revision; check --revision"
    if caused_by(RepositoryNotFoundError) or caused_by(HFValidationError):
        return (
            "there is no such folder here and no such repository on the Hub; check the name, and log in with "
            "`hf auth login` if it is private"
        )
    if caused_by(LocalEntryNotFoundError) or "connect" in str(error):
        return (
            "it is neither a folder here nor in the local cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is "
            f"set); connect once, or run `hf download {source} --local-dir FOLDER` on a machine that is connected, "
            "copy the folder, and give that as the model"
        )
    if caused_by(EntryNotFoundError):
        return "the Hub repository is no complete model: it needs config.json, preprocessor_config.json and weights"
    if "no file named" in str(error):
        return "it holds no model.safetensors; pickled weights are read only by `hf-segvit convert`"
    return str(error).splitlines()[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and reports: what matters of them is checked by the caller."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
