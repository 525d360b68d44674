"""Load a model and its image processor; every failure is a ValueError with a remedy.

`load_universal_model` takes any universal segmentation model, ours (fused ones too) and those of Transformers;
`load_fused_model` joins one with a ViT-P, or loads what was saved as such; `load_segmentation_model`,
`load_mask2former_vit`,
`load_point_classifier` and `load_fused_checkpoint` take one type each. Models are in evaluation mode, on the CPU.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..hub.export_record import exported_format
from ..models.checkpoint_guard import load_foreign_model
from ..models.checkpoint_json import errors_name, path_of, shown, stored_config
from ..models.configuration_eomt import EoMTConfig
from ..models.configuration_mask2former_vit import Mask2FormerViTConfig
from ..models.configuration_vit_p import ViTPConfig
from ..models.configuration_vit_p_fusion import ViTPFusionConfig
from ..models.image_processing_eomt import EoMTImageProcessor
from ..models.image_processing_plain_vit import PROCESSOR, PlainViTImageProcessor, check_settings, stored_settings
from ..models.image_processing_vit_p import ViTPImageProcessor
from ..models.image_processing_vit_p_fusion import ViTPFusionImageProcessor
from ..models.mask2former_annealing import restore_mask_annealing
from ..models.modeling_eomt import EoMTForUniversalSegmentation
from ..models.modeling_mask2former_vit import Mask2FormerViTForUniversalSegmentation
from ..models.modeling_vit_p import ViTPForPointClassification
from ..models.modeling_vit_p_fusion import ViTPFusionForUniversalSegmentation
from ..models.transformers_eomt import TRANSFORMERS_EOMT_TYPES
from ..weight_checks import check_finite, refuse_misfits
from .exported_models import load_exported_model
from .quantization import plain_tensors
from .runtimes import RuntimeSettings

SEGMENTATION_TYPES = (EoMTConfig.model_type, *TRANSFORMERS_EOMT_TYPES)


def load_segmentation_model(
    source: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[EoMTForUniversalSegmentation, EoMTImageProcessor]:
    """Load a checkpoint of this package, or of Transformers' own `eomt` or `eomt_dinov3`, for inference.

    Args:
        source: a folder, or the id of a Hub repository.
        revision: branch, tag or commit of the repository.
        dtype: of the weights.

    Raises:
        ValueError: the source cannot be reached, is of another type, is damaged, or lacks weights.
    """
    model = _load_model(EoMTForUniversalSegmentation, SEGMENTATION_TYPES, "segments", source, revision, dtype)
    processor = _load_processor(EoMTImageProcessor, source, revision)
    _refuse_other_input(source, model.config, processor)
    return model, processor


def load_mask2former_vit(
    source: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Mask2FormerViTForUniversalSegmentation, EoMTImageProcessor]:
    """Load a Mask2Former on a plain ViT of this package, for inference; see `load_segmentation_model`."""
    types = (Mask2FormerViTConfig.model_type,)
    model = _load_model(Mask2FormerViTForUniversalSegmentation, types, "segments", source, revision, dtype)
    processor = _load_processor(EoMTImageProcessor, source, revision)
    _refuse_other_input(source, model.config, processor)
    return model, processor


def load_point_classifier(
    source: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    runtime: RuntimeSettings | None = None,
) -> tuple[ViTPForPointClassification, ViTPImageProcessor]:
    """Load a ViT-P of this package, exported or not, for inference; see `load_universal_model`."""
    types = (ViTPConfig.model_type,)
    if _is_exported(source, revision, runtime):
        folder = _exported_folder(source, revision)
        if checkpoint_type(folder, None) not in types:
            raise ValueError(
                f"{source} is an exported model that segments; this command classifies points with a ViT-P"
            )
        model: Any = load_exported_model(Path(folder), runtime)
        return model, _load_processor(ViTPImageProcessor, folder, None)
    model = _load_model(ViTPForPointClassification, types, "classifies points", source, revision, dtype)
    processor = _load_processor(ViTPImageProcessor, source, revision)
    _refuse_other_input(source, model.config, processor)
    return model, processor


def load_fused_checkpoint(
    source: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[ViTPFusionForUniversalSegmentation, ViTPFusionImageProcessor]:
    """Load a generator and a ViT-P saved as one model; see `load_segmentation_model`."""
    types = (ViTPFusionConfig.model_type,)
    model = _load_model(ViTPFusionForUniversalSegmentation, types, "segments", source, revision, dtype)
    processor = _load_processor(ViTPFusionImageProcessor, source, revision)
    _refuse_other_input(source, model.config.classifier_config, processor.classifier, "classifier.")
    if isinstance(processor.generator, EoMTImageProcessor):
        _refuse_other_input(source, model.config.generator_config, processor.generator, "generator.")
    return model, processor


def _refuse_other_input(source: str, config: Any, processor: Any, part: str = "") -> None:
    """Refuse an image processor that makes inputs which the model cannot take."""
    height, width = processor.size["height"], processor.size["width"]
    scaled = getattr(processor, "do_pad", True) or processor.do_split_image
    if scaled and (height % config.patch_size or width % config.patch_size):
        raise ValueError(
            f"{source}: {PROCESSOR}: {part}size is {height} x {width} pixels, not multiples of the model's patch_size "
            f"{config.patch_size}; set it to the model's image_size"
        )
    means = processor.image_mean
    if isinstance(means, list | tuple) and len(means) != config.num_channels:
        raise ValueError(
            f"{source}: {PROCESSOR}: {part}image_mean has {len(means)} values, but the model takes images of "
            f"{config.num_channels} channels; give image_mean and image_std one for each"
        )


def _load_model(
    cls: Any, types: Sequence[str], purpose: str, source: str, revision: str | None, dtype: torch.dtype
) -> Any:
    refuse_missing_folder(source)
    try:
        settings = stored_config(source, revision=revision)
        model_type = settings.get("model_type")
        if exported_format(settings):
            raise ValueError(
                f"{source} is a model exported to {exported_format(settings)}, which has no weights for PyTorch; name "
                "the folder that it was exported from"
            )
        if model_type is None:
            raise ValueError(f"{path_of(settings)}: it has no model_type; copy it or save the model again")
        if model_type not in types:
            raise ValueError(
                f"{path_of(settings)}: a model of type {shown(model_type)}; this command {purpose} with those of type "
                f"{', '.join(types)}; name one of them"
            )
        with quiet_transformers():
            model, report = cls.from_pretrained(
                source,
                revision=revision,
                dtype=dtype,
                use_safetensors=True,  # pickled weights could run code
                ignore_mismatched_sizes=True,  # reported below, with names and sizes
                output_loading_info=True,
            )
    except OSError as error:
        raise ValueError(f"cannot load {source}: {_reason(source, error)}") from error
    except SafetensorError as error:
        raise ValueError(f"cannot load {source}: its weights are damaged; copy or save it again") from error
    _refuse_incomplete(source, report)
    out_of_file(model)
    # NaN would load silently, and segment nothing.
    check_finite(model.state_dict(), source)
    return model.eval()


def _refuse_incomplete(source: str, report: dict[str, Any]) -> None:
    """Refuse weights that lack a part of the model, by the loading report of `from_pretrained`."""
    # `from_pretrained` fills what is missing or of another size with random numbers; surplus weights do no harm.
    refuse_misfits(
        sorted(report["missing_keys"]),
        (),
        sorted(report["mismatched_keys"]),
        "it is no complete model of its type; train it, copy it again, or save model and configuration together with "
        "model.save_pretrained(folder)",
        f"{_weights_name(source)}: the weights do not fit its config.json",
    )


def _weights_name(source: str) -> str:
    """The weights file of a local folder, or its index; the source itself if it is on the Hub."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    return next((str(Path(source) / name) for name in names if (Path(source) / name).is_file()), source)


def out_of_file(model: torch.nn.Module) -> None:
    """Copy the weights of a model from its file to memory, in place.

    On the CPU, `from_pretrained` leaves them where they are in the file. Whoever shortened it would end the process by
    a bus error, and whoever wrote into it would change weights that have been checked.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()


def _load_processor(cls: Any, source: str, revision: str | None) -> Any:
    try:
        return cls.from_pretrained(source, revision=revision or "main")
    except OSError as error:
        if _caused_by(error, json.JSONDecodeError):
            raise ValueError(f"cannot load {source}: {_reason(source, error)}") from error
        raise ValueError(
            f"cannot load {source}: no preprocessor_config.json, the settings of its image processor; save it there "
            "with processor.save_pretrained(folder)"
        ) from error


def refuse_missing_folder(source: str) -> None:
    """Refuse at once, without asking the Hub, what is neither a model's folder nor formed like a Hub id."""
    path = Path(source)
    if path.is_file():
        raise ValueError(f"{source} is a file; name the folder that holds config.json and model.safetensors")
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = sorted(str(file.parent) for file in path.glob("*/config.json"))
            raise ValueError(
                f"{source} holds no config.json; name the folder that save_pretrained or training wrote"
                + (f", such as {inside[0]}" if inside else "")
            )
    # A Hub id has exactly one slash; anything else was meant as a path, and the Hub's error would mislead.
    elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1 or "\\" in source:
        raise ValueError(f"there is no folder {source}, and a Hub id looks like owner/name; check the path")


def _reason(source: str, error: OSError) -> str:
    """What lies behind an OSError of `from_pretrained`, and the remedy."""
    # The order matters: GatedRepoError is a RepositoryNotFoundError, and LocalEntryNotFoundError an EntryNotFoundError.
    if _caused_by(error, GatedRepoError):
        return f"access is restricted; ask for it at https://huggingface.co/{source} and log in with `hf auth login`"
    if _caused_by(error, RevisionNotFoundError):
        return "the Hub repository has no such revision; check --revision"
    if _caused_by(error, RepositoryNotFoundError) or _caused_by(error, HFValidationError):
        return (
            "there is no such folder here and no such repository on the Hub; check the name, and log in with "
            "`hf auth login` if it is private"
        )
    if _caused_by(error, LocalEntryNotFoundError) or "connect" in str(error):
        return (
            "it is neither a folder here nor in the local cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is "
            f"set); connect once, or run `hf download {source} --local-dir FOLDER` on a machine that is connected, "
            "copy the folder, and give that as the model"
        )
    if _caused_by(error, EntryNotFoundError):
        return "the Hub repository is no complete model: it needs config.json, preprocessor_config.json and weights"
    if "no file named" in str(error):
        return "it holds no model.safetensors; pickled weights are read only by `hf-segvit convert`"
    return str(error).splitlines()[0]


def _caused_by(error: BaseException, kind: type[BaseException]) -> bool:
    """Whether an error of this class lies behind another one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kind):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence Transformers' progress bars and reports; callers check what matters themselves."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_universal_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    runtime: RuntimeSettings | None = None,
) -> tuple[Any, Any]:
    """Load any universal segmentation model, exported or not; other arguments as for `load_segmentation_model`.

    The processor is the image processor, or for a OneFormer its OneFormerProcessor. `runtime` is how to run the model.
    """
    if _is_exported(source, revision, runtime):
        folder = _exported_folder(source, revision)
        model_type = checkpoint_type(folder, None)
        if model_type == ViTPConfig.model_type:
            raise ValueError(f"{source} is an exported ViT-P, which classifies points; segment with an EoMT")
        settings = replace(runtime or RuntimeSettings(), dtype=dtype)
        return load_exported_model(Path(folder), settings), load_image_processor(folder, model_type)
    model_type = checkpoint_type(source, revision)
    if model_type == ViTPFusionConfig.model_type:
        return load_fused_checkpoint(source, revision=revision, dtype=dtype)
    if model_type in (None, *SEGMENTATION_TYPES):  # without a type, loading it explains what is wrong
        return load_segmentation_model(source, revision=revision, dtype=dtype)
    if model_type == Mask2FormerViTConfig.model_type:
        return load_mask2former_vit(source, revision=revision, dtype=dtype)
    if model_type not in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES:
        ours = (*SEGMENTATION_TYPES, Mask2FormerViTConfig.model_type, ViTPFusionConfig.model_type)
        known = (*ours, "mask2former", "maskformer", "oneformer")
        raise ValueError(f"{source} is a model of type {model_type!r}; those of type {', '.join(known)} segment")
    try:
        with quiet_transformers():
            options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # reported below
            model, report = load_foreign_model(source, revision=revision, dtype=dtype, **options)
        processor = _foreign_processor(source, model_type, revision)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"cannot load {source}, a model of type {model_type!r}, for universal segmentation: {error}"
        ) from error
    _refuse_incomplete(source, report)
    with errors_name(f"{source}: config.json"):
        restore_mask_annealing(model)
    out_of_file(model)
    check_finite(model.state_dict(), source)
    return model.eval(), processor


def _foreign_processor(source: str, model_type: str | None, revision: str | None) -> Any:
    """The processor of a model of Transformers, without code from its repository."""
    check_settings(PlainViTImageProcessor, stored_settings(source, revision=revision), f"{source}: {PROCESSOR}")
    loader = AutoProcessor if model_type == "oneformer" else AutoImageProcessor
    with errors_name(f"{source}: {PROCESSOR}"):
        return loader.from_pretrained(source, revision=revision, trust_remote_code=False)


def load_fused_model(
    generator: str,
    classifier: str | None = None,
    *,
    alpha: float | None = None,
    label_mismatch: str = "error",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[ViTPFusionForUniversalSegmentation, ViTPFusionImageProcessor]:
    """Join a generator and a ViT-P, or load a checkpoint of both.

    Args:
        generator: folder or Hub id of a universal segmentation model, or, without classifier, of a fused one.
        classifier: folder or Hub id of a ViT-P.
        alpha: weight of ViT-P in all tasks; `None`: the checkpoint's, or 0.4.
        label_mismatch: `"error"`, or `"keep"` to fuse the classes that both know.
        revision: branch, tag or commit of the generator's repository.
        dtype: of the weights of both.

    Raises:
        ValueError: a part cannot be loaded or is of another kind, or their classes differ.
    """
    if classifier is None:
        if checkpoint_type(generator, revision) != ViTPFusionConfig.model_type:
            raise ValueError(f"{generator} is no fused model ({ViTPFusionConfig.model_type}); name a classifier too")
        model, processor = load_fused_checkpoint(generator, revision=revision, dtype=dtype)
        if alpha is not None:
            model.config.alpha = alpha
            model.config.check()
    else:
        generator_model, generator_processor = load_universal_model(generator, revision=revision, dtype=dtype)
        if isinstance(generator_model, ViTPFusionForUniversalSegmentation):
            raise ValueError(
                f"{generator} is a fused model, which has a classifier already; name its generator instead"
            )
        # `revision` names a commit of the generator's repository only.
        classifier_pair = load_point_classifier(classifier, dtype=dtype)
        model, processor = join_models(
            (generator_model, generator_processor),
            classifier_pair,
            alpha=0.4 if alpha is None else alpha,
            label_mismatch=label_mismatch,
        )
    return model, processor


def join_models(
    generator: tuple[Any, Any], classifier: tuple[Any, Any], *, alpha: float = 0.4, label_mismatch: str = "error"
) -> tuple[ViTPFusionForUniversalSegmentation, ViTPFusionImageProcessor]:
    """Join a generator and a ViT-P in memory, each with its image processor; their weights are shared, not copied."""
    (generator_model, generator_processor), (classifier_model, classifier_processor) = generator, classifier
    model = ViTPFusionForUniversalSegmentation.from_generator_and_classifier(
        generator_model,
        classifier_model,
        alpha,
        generator_processor=generator_processor,
        label_mismatch=label_mismatch,
        task=getattr(generator_processor, "task", "panoptic"),
    )
    processor = ViTPFusionImageProcessor.from_generator_and_classifier(
        generator_processor, classifier_processor, config=model.config
    )
    return model, processor


def is_fused(model: Any) -> bool:
    """Whether a model is a generator joined with a classifier."""
    return getattr(getattr(model, "config", None), "model_type", None) == ViTPFusionConfig.model_type


def with_alpha(model: ViTPFusionForUniversalSegmentation, outputs: Any, alpha: float) -> Any:
    """Outputs of a fused model for another alpha, from the logits of its parts; 0 is the generator alone.

    Unless alpha is 0, all queries must have been classified.
    """
    generated = outputs.generator_class_queries_logits
    fused = generated.float() if alpha == 0 else model.fuse(generated, outputs.prompt_logits, alpha=alpha)
    return type(outputs)(**{**outputs, "class_queries_logits": fused})


def load_image_processor(source: str, model_type: str | None, revision: str | None = None) -> Any:
    """The image processor of a segmentation model of this type, or a OneFormer's OneFormerProcessor."""
    if model_type == ViTPFusionConfig.model_type:
        return _load_processor(ViTPFusionImageProcessor, source, revision)
    if model_type in (None, *SEGMENTATION_TYPES, Mask2FormerViTConfig.model_type):
        return _load_processor(EoMTImageProcessor, source, revision)
    try:
        return _foreign_processor(source, model_type, revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the image processor of {source}: {error}; name its task with --task") from error


def checkpoint_type(source: str, revision: str | None) -> str | None:
    """The model type in a checkpoint's configuration; `None` if that cannot be read."""
    refuse_missing_folder(source)
    try:
        return stored_config(source, revision=revision).get("model_type")
    except OSError:
        return None  # the loader that is tried next names the reason


def is_exported(source: str, revision: str | None = None) -> bool:
    """Whether a checkpoint is an exported model rather than weights for PyTorch."""
    refuse_missing_folder(source)
    try:
        return exported_format(stored_config(source, revision=revision)) is not None
    except OSError:
        return False  # the loader that is tried next names the reason


def _is_exported(source: str, revision: str | None, runtime: RuntimeSettings | None) -> bool:
    """`is_exported`; for weights of PyTorch, its threads are set, and other runtimes refused."""
    if is_exported(source, revision):
        return True
    if runtime is not None and runtime.runtime not in (None, "pytorch"):
        raise ValueError(
            f"runtime={runtime.runtime!r}: {source} has weights for PyTorch; export it with `hf-segvit export` first"
        )
    if runtime is not None and runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    return False


def load_export(source: str, revision: str | None = None, **settings: Any) -> Any:
    """The model of an exported folder or repository; `settings` are those of `RuntimeSettings`."""
    return load_exported_model(Path(_exported_folder(source, revision)), RuntimeSettings(**settings))


def _exported_folder(source: str, revision: str | None) -> str:
    """The folder of an exported model, fetched if it is on the Hub."""
    if os.path.isdir(source):
        return source
    try:
        return snapshot_download(source, revision=revision, ignore_patterns=["*.safetensors", "*.py"])
    except OSError as error:
        raise ValueError(f"cannot load {source}: {_reason(source, error)}") from error


def fingerprint(model: Any, processor: Any) -> str:
    """A short hash that differs between models of other weights, classes, shapes or post-processing."""
    described = {"id2label": model.config.to_dict().get("id2label")}
    if hasattr(processor, "to_dict"):
        described["processor"] = processor.to_dict()
    digest = hashlib.sha256(json.dumps(described, default=repr, sort_keys=True).encode())
    for name, weights in sorted(model.state_dict().items()):
        # A few values of each tensor, as any training changes all tensors that it trains.
        for tensor in plain_tensors(weights):
            values = tensor.flatten()[:64].detach().float().cpu()
            digest.update(f"{name} {tuple(weights.shape)} {values.tolist()}".encode())
    for module in model.modules():  # an exported model has a graph instead of weights
        digest.update(getattr(module, "graph_digest", "").encode())
    return digest.hexdigest()[:16]
