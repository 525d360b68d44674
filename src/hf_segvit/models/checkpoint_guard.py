"""Checks before Transformers loads a checkpoint: no pickle, no foreign code, no size beyond the weights.

`checked_arguments` is called by the `from_pretrained` of our models, `load_foreign_model` loads one of Transformers.
Both look at the headers of the weights first, so that a small file cannot have a large model built.
"""

import copy
import math
import os
import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForUniversalSegmentation, PreTrainedConfig
from transformers.utils import is_peft_available
from transformers.utils.hub import cached_file

from .checkpoint_json import check_foreign_fields, errors_name, hub_arguments, read_table, shown, stored_config
from .safetensors_header import Entries, check_float, check_safetensors, check_shards, weight_map

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)(\.index\.json)?")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_TO_SAFETENSORS = (
    "pickled weights are read only by the explicit command `hf-segvit convert`; to keep another format as it is: "
    "python -c \"import torch; from safetensors.torch import save_file; save_file(torch.load('{0}', "
    "map_location='cpu', weights_only=True), '{1}', {{'format': 'pt'}})\""
)
# A model may be larger than its weights file where parts are new, such as heads for other classes.
_GROWTH = 2
_NEW_ELEMENTS = 2**26


def exported_model(cls: Any, source: Any, kwargs: dict[str, Any]) -> Any:
    """The model of an exported folder or repository, which has graphs instead of weights; `None` for weights.

    Of the arguments of `from_pretrained`, `revision`, `dtype` and those of `RuntimeSettings` count.
    """
    if source is None or kwargs.get("state_dict") is not None:
        return None
    where = hub_arguments(kwargs)
    try:
        settings = stored_config(source, **where)
    except OSError:
        return None  # the loader of weights names the reason
    file_format = settings.get("exported")
    if not isinstance(file_format, str) or settings.get("architectures") != [cls.__name__]:
        return None
    # Inside `try`, as a checkpoint that carries this file as remote code has to load without the package.
    try:
        from hf_segvit.inference.loading import load_export
    except ImportError as error:
        raise ValueError(
            f"{source} is a model exported to {file_format}, which needs the package: `pip install hf-segvit`"
        ) from error
    names = ("runtime", "threads", "device", "allow_native_code")
    options = {name: kwargs[name] for name in names if name in kwargs}
    if isinstance(kwargs.get("dtype"), torch.dtype):  # not "auto", which pipelines pass
        options["dtype"] = kwargs["dtype"]
    return load_export(os.fspath(source), where.get("revision"), **options)


def checked_arguments(cls: Any, source: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `from_pretrained` of ours, after the files of `source` were checked.

    Raises:
        ValueError: the weights are a pickle, damaged, not floating point, or far smaller than the model that the
            configuration describes; or an adapter beside them is not plain LoRA.
    """
    kwargs = _without_pickles(kwargs)
    if source is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
        return kwargs
    weights = checked_weights(source, kwargs)
    if weights is not None:
        where = hub_arguments(kwargs)
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or source, **where)
        refuse_growth(cls, config, source, weights[1])
    return kwargs


def _without_pickles(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with safetensors as the only format."""
    if kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False: " + _TO_SAFETENSORS.format("pytorch_model.bin", WEIGHTS))
    return {**kwargs, "use_safetensors": True}


def refuse_growth(build: Any, config: Any, source: Any, entries: Entries) -> None:
    """Refuse a configuration whose model, made by `build`, has far more elements than the weights."""
    with errors_name(f"{source}: config.json"), torch.device("meta"):
        model = build(copy.deepcopy(config))
    stored = sum(math.prod(entry["shape"]) for entry in entries.values())
    tensors = model.state_dict()
    needed = sum(tensor.numel() for tensor in tensors.values())
    if needed <= _GROWTH * stored + _NEW_ELEMENTS:
        return
    name = max(tensors, key=lambda name: tensors[name].numel())
    there = f"{entries[name]['shape']}" if name in entries else "missing"
    raise ValueError(
        f"{source}: config.json describes a model of {needed} numbers, but the weights hold {stored}: {name} would be "
        f"{list(tensors[name].shape)}, in the file it is {there}; copy model and configuration together again"
    )


def checked_weights(source: Any, kwargs: dict[str, Any]) -> tuple[list[str], Entries] | None:
    """The files that Transformers would load and their headers, checked; `None` if there are none."""
    source = os.fspath(source)
    variant, subfolder = kwargs.get("variant"), kwargs.get("subfolder") or ""
    weights, index = (_with_variant(name, variant) for name in (WEIGHTS, INDEX))
    if os.path.isfile(source):
        if not source.endswith(".safetensors"):
            raise ValueError(f"{source} is a file; name the folder that holds config.json and {WEIGHTS}")
        entries = check_safetensors(source)
        check_float(source, entries)
        return [source], entries
    if os.path.isdir(source):
        folder = os.path.join(source, subfolder)
        _check_adapter(os.path.join(folder, ADAPTER_CONFIG), os.path.join(folder, ADAPTER_WEIGHTS), local=True)
        names = os.listdir(folder) if os.path.isdir(folder) else []
        if any(_DISTRIBUTED.fullmatch(name) for name in names):
            raise ValueError(f"{folder}: holds shards of a distributed save; save the whole model with save_pretrained")
        paths = [os.path.join(folder, name) for name in (weights, index)]
        found = next((path for path in paths if os.path.isfile(path)), None)
        pickled = sorted(name for name in names if _PICKLES.fullmatch(name))
        if found is None and pickled:
            raise ValueError(
                f"{source} holds no {weights}, but {shown(pickled[0])}; " + _TO_SAFETENSORS.format(pickled[0], weights)
            )
    else:
        where = {**hub_arguments(kwargs), "_raise_exceptions_for_missing_entries": False}
        if is_peft_available():
            adapter = cached_file(source, ADAPTER_CONFIG, **where)
            if adapter is not None:
                _check_adapter(adapter, cached_file(source, ADAPTER_WEIGHTS, **where), local=False)
        found = cached_file(source, weights, **where) or cached_file(source, index, **where)
        if found is not None and found.endswith(".json"):
            for shard in sorted(set(weight_map(found).values())):
                cached_file(source, shard, **hub_arguments(kwargs))  # the cache puts it beside the index
    if found is None:
        return None  # Transformers says what is missing, and where it looked
    files, entries = [found], {}
    if found.endswith(".json"):
        entries = check_shards(found)
        files = [os.path.join(os.path.dirname(found), shard) for shard in sorted(set(weight_map(found).values()))]
    else:
        entries = check_safetensors(found)
    check_float(found, entries)
    return files, entries


def _with_variant(name: str, variant: str | None) -> str:
    if variant is None:
        return name
    stem, _, ending = name.partition(".")
    kind, _, rest = ending.partition(".")
    # As Transformers names them: model.fp16.safetensors, model.safetensors.index.fp16.json.
    return f"{stem}.{variant}.{ending}" if not rest else f"{stem}.{kind}.index.{variant}.json"


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Settings of plain LoRA and their types. All others must have no value: several are regular expressions, which can take
# hours, or name modules to import.
_LORA_TYPES: dict[str, Any] = {
    "r": int,
    "lora_alpha": int | float,
    "lora_dropout": int | float,
    "target_modules": list[str] | str | None,
    "modules_to_save": list[str] | None,
    "bias": str,
    "task_type": str | None,
    "base_model_name_or_path": str | None,
    "revision": str | None,
    "peft_version": str | None,
    "init_lora_weights": bool,
    "inference_mode": bool,
    "use_rslora": bool,
    "use_dora": bool,
    "fan_in_fan_out": bool,
    "megatron_core": str | None,  # a default that means nothing without megatron_config
    "auto_mapping": dict | None,
}
MAX_RANK = 2**14


def _check_adapter(config: str, weights: str | None, local: bool) -> None:
    """Refuse an adapter that is not plain LoRA with the ranks of its weights; without a file there is none."""
    from huggingface_hub.dataclasses import type_validator

    if not os.path.exists(config) or not is_peft_available():
        return
    fields = read_table(config)
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{config}: peft_type is {shown(fields.get('peft_type'))}; only 'LORA' is read from files")
    for name, value in fields.items():
        if name == "peft_type":
            continue
        if name not in _LORA_TYPES:
            if value not in (None, False, "", {}, []):
                raise ValueError(f"{config}: {shown(name)} is {shown(value)}; only plain LoRA is read from files")
            continue
        try:
            type_validator(name, value, _LORA_TYPES[name])
        except TypeError as error:
            raise ValueError(f"{config}: {name} is {shown(value)}, not {_LORA_TYPES[name]}") from error
    targets = fields.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        raise ValueError(
            f"{config}: target_modules is {shown(targets)}, a regular expression; list the names of the modules"
        )
    if not targets:
        raise ValueError(f"{config}: target_modules is {shown(targets)}; list the names of the modules")
    rank = fields.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{config}: r is {shown(rank)}; it must be between 1 and {MAX_RANK}")
    if not all(math.isfinite(fields.get(name, 0)) for name in ("lora_alpha", "lora_dropout")):
        raise ValueError(f"{config}: lora_alpha and lora_dropout must be finite")
    if not 0 <= fields.get("lora_dropout", 0) < 1:
        raise ValueError(f"{config}: lora_dropout is {fields['lora_dropout']}; it must be between 0 and 1")
    if fields.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"{config}: bias is {shown(fields['bias'])}, not 'none', 'all' or 'lora_only'")
    base = fields.get("base_model_name_or_path")
    folder = os.path.dirname(config)
    if local and not os.path.isfile(os.path.join(folder, "config.json")) and not os.path.isdir(base or ""):
        raise ValueError(
            f"{config}: base_model_name_or_path is {shown(base)}, which is no folder here, and a local folder does not "
            "lead to the network; put the base model's files beside the adapter, or name its folder"
        )
    if weights is None or not os.path.isfile(weights):
        raise ValueError(
            f"{config}: there is no {ADAPTER_WEIGHTS} beside it; "
            + _TO_SAFETENSORS.format("adapter_model.bin", ADAPTER_WEIGHTS)
        )
    entries = check_safetensors(weights)
    check_float(weights, entries)
    for name, entry in entries.items():
        if name.endswith(".lora_A.weight") and entry["shape"][:1] != [rank]:
            raise ValueError(f"{config}: r is {rank}, but {shown(name)} in {weights} has the shape {entry['shape']}")
    if not any(name.endswith(".lora_A.weight") for name in entries):
        raise ValueError(f"{weights}: holds no LoRA weights (*.lora_A.weight), which {ADAPTER_CONFIG} says")
    adapted = [f".{name.removesuffix('.lora_A.weight')}" for name in entries if name.endswith(".lora_A.weight")]
    for target in targets if not isinstance(targets, str) else ():
        if not any(name.endswith(f".{target}") for name in adapted):
            raise ValueError(
                f"{config}: target_modules names {shown(target)}, for which {weights} has no weights; list the modules "
                "that were adapted"
            )


def load_foreign_model(source: Any, **kwargs: Any) -> Any:
    """A universal segmentation model of Transformers: from safetensors, without code from its repository.

    Args:
        source: folder or Hub id; a folder never leads to the network.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: as `checked_arguments`; or Transformers cannot use the configuration.
        OSError: the source cannot be read.
    """
    kwargs = {**_without_pickles(kwargs), "trust_remote_code": kwargs.get("trust_remote_code", False)}
    where, local = hub_arguments(kwargs), os.path.isdir(source)
    fields = stored_config(source, **where)
    name = f"{source}: config.json"
    check_foreign_fields(fields, name, local)
    weights = checked_weights(source, kwargs)
    if weights is not None and not isinstance(kwargs.get("config"), PreTrainedConfig):
        trust = {"trust_remote_code": kwargs["trust_remote_code"]}
        with errors_name(name):
            config = AutoConfig.from_pretrained(source, **trust, **where)
        refuse_growth(
            lambda config: AutoModelForUniversalSegmentation.from_config(config, **trust), config, source, weights[1]
        )
    return AutoModelForUniversalSegmentation.from_pretrained(source, **kwargs)
