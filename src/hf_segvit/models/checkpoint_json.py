"""Read the JSON files of a checkpoint: bounded, and every field of its type.

`read_table` reads one file, `stored_config` the config.json of a folder or Hub repository, `check_fields` compares
fields with declared types, and `check_foreign_fields` refuses what a model of Transformers must not be told by a file.
All errors are ValueErrors that name file and key.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

# A configuration with 10,000 classes has under 1 MB; Python objects take up to 40 times the space of their text.
MAX_JSON_BYTES = 2**24
MAX_DEPTH = 32
_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Those that need neither another library nor a kernel from the Hub.
_ATTENTIONS = (None, "eager", "sdpa", "flex_attention")
_ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# Fields by which a file could have other files opened, other code run or other weights made than the model's own.
_REFUSED = {
    "transformers_weights": "it names another weights file; name the weights model.safetensors and remove the field",
    "quantization_config": "quantised weights are not supported; save the original ones",
    "configuration_files": "it names another configuration; remove the field",
    "fusion_config": "pass fusion_config to from_pretrained instead",
    "per_layer_config": "layers that differ are not supported",
    "distributed_config": "pass distributed_config to from_pretrained instead",
    "experts_implementation": "these models have no experts; remove the field",
    "_experts_implementation": "these models have no experts; remove the field",
    "_experts_implementation_internal": "these models have no experts; remove the field",
}


def shown(value: Any, limit: int = 100) -> str:
    """A value from a file for a message: one line, cut to a readable length."""
    if isinstance(value, str) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} characters)"
    # Outermost first, as the text of a whole table may have megabytes.
    if isinstance(value, dict | list | tuple) and len(value) > 10:
        return f"a {type(value).__name__} of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def parse_table(text: bytes, where: str) -> dict[str, Any]:
    """The table in JSON text: without duplicate names, numbers that are not finite, or deep nesting."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # `json` would silently keep the last
            name, count = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"{shown(name)} is listed {'twice' if count == 2 else f'{count} times'}")
        return found

    def not_finite(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=table, parse_constant=not_finite)
    except RecursionError as error:
        raise ValueError(f"{where}: cannot be read, as it is nested too deep") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError, too
        raise ValueError(f"{where}: cannot be read as JSON ({json_fault(error)})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: holds {json_kind(values)}, not a table of names and values")
    _check_depth(values, where)
    return values


def json_fault(error: ValueError) -> str:
    """What is wrong with bytes that are no JSON, from the error of reading them; a short text without a remedy."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        if not error.doc.strip():
            return "it is empty"
        return f"an error at line {error.lineno}, column {error.colno}"
    if "digits" in str(error):  # Python's limit for whole numbers
        return "a number of thousands of digits"
    return str(error)  # our own, of duplicate names and numbers that are not finite


def json_kind(value: Any) -> str:
    """What a JSON value is, as a message says it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {dict: "a table", list: "a list", str: "a text"}
    return kinds.get(type(value), "a number")


def _check_depth(values: dict[str, Any], where: str) -> None:
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        inner = (entry for value in level for entry in (value.values() if isinstance(value, dict) else value))
        level = [entry for entry in inner if isinstance(entry, dict | list)]
        if not level:
            return
    raise ValueError(f"{where}: nested deeper than {MAX_DEPTH} levels")


def read_table(path: str | os.PathLike[str]) -> "StoredFields":
    """The table in a JSON file.

    Raises:
        ValueError: it is no regular file, larger than `MAX_JSON_BYTES`, or not as `parse_table` demands.
    """
    if not os.path.isfile(path):  # such as a pipe, from which reading never ends
        raise ValueError(f"{path}: no such file, or not a regular one; copy or save it again")
    with open(path, "rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(
            f"{path}: more than {MAX_JSON_BYTES} bytes, too many for this kind of file; copy or save it again"
        )
    try:
        fields = StoredFields(parse_table(text, str(path)))
    except ValueError as error:
        raise ValueError(f"{error}; copy or save it again") from error
    fields.path = str(path)
    return fields


class StoredFields(dict[str, Any]):
    """Fields with the path of their file, for messages."""

    path = "config.json"


class StoredConfig(PreTrainedConfig):
    """Base of our configurations, whose files are read by `read_table`."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        return read_table(json_file)


# Arguments of from_pretrained that say where files are, not what the model is.
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `from_pretrained` that say where and how a file is fetched."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def stored_config(source: Any, **kwargs: Any) -> dict[str, Any]:
    """The fields in the config.json of a folder or Hub repository, of any type; `kwargs` say where it is."""
    fields, _ = StoredConfig.get_config_dict(source, **kwargs)
    model_type = fields.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise ValueError(f"{path_of(fields)}: model_type is {shown(model_type)}, not a name")
    return fields


def path_of(fields: Mapping[str, Any], name_or_path: Any = None) -> str:
    """Where fields come from, as a message says it."""
    if isinstance(fields, StoredFields):
        return fields.path
    return f"{name_or_path}: config.json" if name_or_path else "config.json"


@contextmanager
def errors_name(where: str) -> Iterator[None]:
    """Turn whatever a constructor raises about stored fields into a ValueError that says where they stand."""
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, ValueError) and text.startswith(where):
            raise
        if not isinstance(error, ValueError):  # what Python or a library says of its own code
            text = "a value is of a type or size that does not fit; write the file again with save_pretrained"
        raise ValueError(f"{where}: {text[:600]}") from error


def check_type(where: str, name: str, value: Any, expected: Any) -> None:
    """Refuse a value that is not of a declared type, or a number that is not finite or larger than any setting."""
    try:
        type_validator(name, _with_floats(value) if "float" in str(expected) else value, expected)
    except TypeError as error:
        wanted = getattr(expected, "__name__", None) if isinstance(expected, type) else str(expected)
        raise ValueError(
            f"{where}: {name} is {shown(value)}, {json_kind(value)}, not {wanted}; correct it, or save the file again"
        ) from error
    numbers = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
    for number in numbers:
        if isinstance(number, int | float) and not (math.isfinite(number) and abs(number) <= 1e12):
            raise ValueError(f"{where}: {name} is {shown(value)}, too large")


def _with_floats(value: Any) -> Any:
    """A value with its whole numbers as floats: JSON has one kind of number."""
    if isinstance(value, list | tuple):
        return type(value)(map(_with_floats, value))
    return float(value) if type(value) is int and abs(value) < 2**53 else value


def check_fields(config_class: Any, fields: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Refuse stored fields of a wrong type, and those that would change more than the configuration.

    Fields that `config_class` does not declare are kept, as Transformers keeps them, unless they would hide an
    attribute of the class.
    """
    declared = {field.name: field.type for field in config_class.__dataclass_fields__.values()}
    for name, value in fields.items():
        key = f"{prefix}{name}" if len(name) <= 100 else shown(name)
        _refuse_instructions(where, key, name, value)
        if name in ("dtype", "torch_dtype"):
            if value is not None and value not in _DTYPES:
                raise ValueError(f"{where}: {key} is {shown(value)}, not one of {', '.join(_DTYPES)}")
        elif name == "num_labels":
            check_type(where, key, value, int | None)
            if value is not None and not 0 <= value <= MAX_LABELS:
                raise ValueError(f"{where}: {key}={value} must be between 0 and {MAX_LABELS}")
        elif name in ("model_type", "name_or_path", "_name_or_path", "_commit_hash"):
            check_type(where, key, value, str | None)
        elif name == "auto_map":
            check_type(where, key, value, dict | None)
        elif name == "output_attentions":
            check_type(where, key, value, bool | None)
        elif name == "return_dict" and value is False:
            raise ValueError(f"{where}: {key} is false, but the models answer with named outputs; remove it")
        elif name in declared:
            expected = _GENERAL_TYPES.get(name, declared[name])
            if not isinstance(expected, str):  # a postponed annotation
                check_type(where, key, value, expected)
            if name == "id2label" and value is not None:
                _check_label_ids(where, key, value)
        elif name not in (*_ATTENTION_FIELDS, *_REFUSED, "use_return_dict") and (
            name.startswith("__") or hasattr(config_class, name)
        ):
            raise ValueError(f"{where}: {key} is no field of a {config_class.__name__}; remove it")


MAX_LABELS = 100_000
# Fields of every configuration, which Transformers declares as text.
_GENERAL_TYPES: dict[str, Any] = {
    "transformers_version": str | None,
    "architectures": list[str] | None,
    "output_hidden_states": bool | None,
    "return_dict": bool | None,
    "chunk_size_feed_forward": int,
    "is_encoder_decoder": bool,
    "id2label": dict[str, str] | dict[int, str] | None,
    "label2id": dict[str, int] | dict[str, str] | None,
    "problem_type": str | None,
}


def _check_label_ids(where: str, key: str, labels: Mapping[Any, Any]) -> None:
    if len(labels) > MAX_LABELS:
        raise ValueError(f"{where}: {key} names {len(labels)} classes, more than {MAX_LABELS}")
    for label in labels:
        if not isinstance(label, int) and not (label.isdecimal() and label.isascii() and len(label) < 10):
            raise ValueError(f"{where}: {key} has the id {shown(label)}, not a whole number")


def _refuse_instructions(where: str, key: str, name: str, value: Any) -> None:
    if name in _REFUSED and value is not None:
        raise ValueError(f"{where}: {key} is {shown(value)}; {_REFUSED[name]}")
    if name in _ATTENTION_FIELDS and not any(value is known or value == known for known in _ATTENTIONS):
        raise ValueError(
            f"{where}: {key} is {shown(value)}, which may fetch and run code of the Hub; remove it from the file, and "
            "pass attn_implementation to from_pretrained if you want that"
        )


def _refuse_fetched_backbone(fields: Mapping[str, Any], where: str, prefix: str) -> None:
    """Refuse a backbone whose configuration or weights Transformers would ask the network for."""
    named = fields.get("backbone") is not None and fields.get("backbone_config") is None
    # A MaskFormer's decoder takes the configuration of a DETR, whose backbone is timm's and is never built.
    in_decoder = prefix.endswith("decoder_config.")
    if in_decoder and fields.get("use_timm_backbone", True) and not fields.get("backbone_kwargs"):
        return
    if named and fields.get("model_type") != "timm_backbone":
        raise ValueError(
            f"{where}: {prefix}backbone is {shown(fields['backbone'])}, whose configuration Transformers would fetch "
            "from the network; load the model once with its Hub id and save it, which stores backbone_config"
        )
    if fields.get("use_pretrained_backbone"):
        raise ValueError(
            f"{where}: {prefix}use_pretrained_backbone is {shown(fields['use_pretrained_backbone'])}, so weights would "
            "be fetched from the network; set it to false, as the folder's weights contain the backbone's"
        )


# A number of repetitions in a configuration of Transformers; others are widths, whose weights show them.
_REPEATED = ("layers", "blocks", "depths", "depth", "stages", "levels", "num_heads", "attention_heads")
MAX_REPEATED = 1000
MAX_WIDTH = 2**20


def check_foreign_fields(fields: Mapping[str, Any], where: str, local: bool, prefix: str = "") -> None:
    """Refuse, in a configuration of Transformers at any depth, code, downloads, and numbers beyond any model.

    Args:
        local: whether the file lies in a local folder, which must not lead to the network.
    """
    if local:
        _refuse_fetched_backbone(fields, where, prefix)
    for name, value in fields.items():
        key = f"{prefix}{name}" if len(name) <= 100 else shown(name)
        _refuse_instructions(where, key, name, value)
        if name in ("dtype", "torch_dtype") and value is not None and value not in _DTYPES:
            raise ValueError(f"{where}: {key} is {shown(value)}, not one of {', '.join(_DTYPES)}")
        if name == "id2label" and value is not None:
            check_type(where, key, value, dict[str, str] | dict[int, str])
            _check_label_ids(where, key, value)
        if name in ("id2label", "label2id"):
            continue
        if name in _GENERAL_TYPES or name == "output_attentions":
            check_type(where, key, value, _GENERAL_TYPES.get(name, bool | None))
            if name == "return_dict" and value is False:
                raise ValueError(f"{where}: {key} is false, but the models answer with named outputs; remove it")
        if name == "model_type" and not (isinstance(value, str) and value in CONFIG_MAPPING):
            raise ValueError(f"{where}: {key} is {shown(value)}, which this version of Transformers does not know")
        if name.endswith(("_act", "activation_function")) and not (isinstance(value, str) and value in ACT2FN):
            raise ValueError(f"{where}: {key} is {shown(value)}, no activation of Transformers, such as 'gelu'")
        if isinstance(value, dict):
            check_foreign_fields(value, where, local, f"{key}.")
            continue
        limit = MAX_REPEATED if name.endswith(_REPEATED) else MAX_LABELS if name == "num_labels" else MAX_WIDTH
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= limit:
                raise ValueError(f"{where}: {key} is {shown(value)}, more than the {limit} that any model has")
