"""Finding and reading the weights of a Transformers `eomt` or `eomt_dinov3` folder or Hub repository.

Only safetensors are read. The names change once, on the way in; nothing stays registered, so what is saved afterwards
carries this package's own names.
"""

import json
import os
from typing import Any

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils.hub import cached_file

from .transformers_eomt import is_transformers_eomt, translate_state_dict

# Arguments of from_pretrained that say where files are, not what the model is.
_WHERE = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def transformers_eomt_arguments(cls: Any, source: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Turn the arguments for loading a Transformers checkpoint into those for loading its translation.

    Args:
        cls: `EoMTModel` or `EoMTForUniversalSegmentation`.
        source: folder or Hub id, as given to `from_pretrained`.
        kwargs: the keyword arguments of `from_pretrained`.

    Returns:
        Keyword arguments for `from_pretrained(None, ...)` with `config` and `state_dict`, or `None` where the source
        is not of type `eomt` or `eomt_dinov3`.

    Raises:
        OSError: the source has no safetensors weights.
        ValueError: a field or a weight of the checkpoint cannot be expressed.
    """
    if source is None or kwargs.get("state_dict") is not None:
        return None
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    raw_config, _ = PreTrainedConfig.get_config_dict(source, **where)
    if not is_transformers_eomt(raw_config):
        return None

    kwargs = dict(kwargs)
    config = kwargs.pop("config", None)
    given = "masked_attention_probabilities" in kwargs or isinstance(config, PreTrainedConfig)
    if not isinstance(config, PreTrainedConfig):
        config, kwargs = cls.config_class.from_pretrained(config or source, return_unused_kwargs=True, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in _WHERE}

    state_dict, probabilities = translate_state_dict(_read_weights(source, where))
    if probabilities is not None and not given:
        config.masked_attention_probabilities = probabilities
    return {**kwargs, "config": config, "state_dict": state_dict}


def _read_weights(source: str | os.PathLike, where: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of `model.safetensors` or of the shards that its index names."""
    quiet = {"_raise_exceptions_for_missing_entries": False}
    single = cached_file(source, "model.safetensors", **where, **quiet)
    if single is not None:
        return load_state_dict(single)
    index = cached_file(source, "model.safetensors.index.json", **where, **quiet)
    if index is None:
        raise OSError(
            f"{source} holds no model.safetensors; pickled weights are read only by the explicit command "
            "`hf-segvit convert`"
        )
    with open(index, encoding="utf-8") as file:
        shards = sorted(set(json.load(file)["weight_map"].values()))
    state_dict: dict[str, Tensor] = {}
    for shard in shards:
        if os.path.basename(shard) != shard:
            raise ValueError(f"{index} names the shard {shard!r}, which is not a file beside it")
        path = cached_file(source, shard, **where)
        assert path is not None  # a missing shard has raised
        state_dict.update(load_state_dict(path))
    return state_dict
