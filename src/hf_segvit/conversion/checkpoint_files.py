"""Read foreign checkpoints safely: safetensors, and pickles of plain tensors.

`find_checkpoint` finds the file of a folder or Hub repository, `read_checkpoint` reads it with its shards, and
`strip_prefixes` removes what wrappers put before parameter names. Only here does the package open pickles: with
`torch.load(weights_only=True)`, below a size cap, and only for `hf-segvit convert`.
"""

import argparse
import io
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils.hub import cached_file

from ..models.checkpoint_json import shown
from ..models.safetensors_header import check_safetensors, weight_map

GIB = 2**30
# EoMT-7B has 26 GiB in fp32; a Lightning file of a giant with its optimiser states 13 GiB.
DEFAULT_MAX_BYTES = 64 * GIB

SAFETENSORS_NAMES = ("model.safetensors", "model.safetensors.index.json")
PICKLE_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Classes that hold values and do nothing: training scripts store their arguments beside the weights.
_HARMLESS: list[Any] = [argparse.Namespace]
_PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
_SHARD_SUFFIXES = (".safetensors", *_PICKLE_SUFFIXES)
# Keys of the weights in larger checkpoints of training frameworks.
_CONTAINERS = ("state_dict", "model", "model_state_dict", "teacher")


def find_checkpoint(
    source: str | os.PathLike[str],
    names: Sequence[str] = SAFETENSORS_NAMES + PICKLE_NAMES,
    revision: str | None = None,
) -> Path:
    """The local checkpoint file of a source: weights, or the index of shards that lie beside it.

    Args:
        source: a file, a folder, or the id of a Hub repository (`owner/name`), whose file is then downloaded.
        names: file names to look for in a folder or repository, best first.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        ValueError: there is none, or several files could be meant.
        OSError: the Hub cannot be reached, or does not know the repository.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path, names)
    if path.exists():
        raise ValueError(f"{source} is no regular file, and was not opened")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise ValueError(f"{source} is neither a file nor a folder here, nor the id owner/name of a Hub repository")
    for name in names:
        cached = cached_file(str(source), name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if cached is None:
            continue
        if name.endswith(".index.json"):
            for shard in sorted(set(weight_map(cached, _SHARD_SUFFIXES).values())):
                cached_file(str(source), shard, revision=revision)  # the cache puts it beside the index
        return Path(cached)
    where = "the local cache (HF_HUB_OFFLINE is set)" if is_offline_mode() else "the Hub"
    raise ValueError(f"{source} has none of {', '.join(names)} in {where}")


def _in_folder(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = sorted(
        file for file in folder.iterdir() if file.suffix in (".safetensors", ".tar", ".pkl", *_PICKLE_SUFFIXES)
    )
    if len(others) == 1:
        return others[0]
    if others:
        raise ValueError(f"{folder} holds several checkpoints; name one: {', '.join(file.name for file in others)}")
    raise ValueError(
        f"{folder} holds no checkpoint; looked for {', '.join(names)} and any .safetensors, .pth or .ckpt; name the "
        "file"
    )


def read_checkpoint(path: str | os.PathLike[str], max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, Tensor]:
    """All weights of a checkpoint file, on the CPU, under the file's parameter names.

    Args:
        path: a safetensors file; a pickle of tensors with any ending (at the top or under a key such as Lightning's
            `state_dict`); or the `.index.json` of shards in the same folder.
        max_bytes: largest size, of all shards together.

    Raises:
        ValueError: the file is too large, damaged, of an unknown kind, or holds anything but tensors; or an index names
            a shard that is missing or elsewhere.
    """
    path = Path(path)
    files = [path]
    places = None
    if path.name.endswith(".index.json"):
        places = weight_map(path, _SHARD_SUFFIXES)
        files = [path.parent / shard for shard in sorted(set(places.values()))]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{path} names the shard {file.name}, which is not beside it; download it too")
    size = sum(os.path.getsize(file) for file in files)
    if size > max_bytes:
        raise ValueError(
            f"{path}: {size / GIB:.1f} GiB of weights are more than the cap of {max_bytes / GIB:.1f} GiB; if that is "
            "right, raise it with --max-gib"
        )
    weights = _read_file(path) if places is None else _read_shards(path, files, places)
    _check_numbers(path, weights)
    return weights


def _check_numbers(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse a number in a name, such as of a block, beyond what the number of tensors allows."""
    # A model is built with so many blocks, whatever it then lacks.
    most = max(len(weights), 100)
    for name in weights:
        if any(len(number) > 9 or int(number) > most for number in re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)):
            raise ValueError(f"{path}: {shown(name)} has a number beyond its {len(weights)} tensors; it is damaged")


def _read_shards(path: Path, files: list[Path], places: dict[str, str]) -> dict[str, Tensor]:
    state_dict: dict[str, Tensor] = {}
    for file in files:
        tensors = _read_file(file)
        listed = {name for name, shard in places.items() if shard == file.name}
        odd = sorted(listed ^ tensors.keys())
        if odd:
            where = "lacks" if odd[0] in listed else "also holds"
            raise ValueError(f"{path} and its shard disagree: {file.name} {where} {shown(odd[0])}; download both again")
        state_dict.update(tensors)
    return state_dict


def _read_file(path: Path) -> dict[str, Tensor]:
    # By content: endings are a matter of taste, such as timm's .pth.tar for what is no tar archive.
    kind = _kind_of(path)
    if kind == "safetensors":
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:  # memory-mapped: tensors cost memory when they are used
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if kind == "pickle":
        return _read_pickle(path)
    raise ValueError(f"{path}: not a checkpoint this reads, but {kind}")


def _kind_of(path: Path) -> str:
    """`"safetensors"`, `"pickle"` (PyTorch's zip archives too), or what else a file seems to be, with a remedy."""
    with open(path, "rb") as file:
        start = file.read(512)
    if path.suffix == ".safetensors" or (len(start) > 9 and start[8:9] == b"{" and not any(start[5:8])):
        return "safetensors"  # 8 bytes with the length of a JSON header, and that header
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in its stead; fetch the file itself with `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "a web page; download the file itself, not the page that links to it"
    if start[257:262] == b"ustar" or start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "an archive; unpack it and name the checkpoint in it"
    # Files with a usual ending go to PyTorch in any case, whose reason is better than ours.
    if start.startswith((b"PK\x03\x04", b"\x80")) or path.suffix in _PICKLE_SUFFIXES:
        return "pickle"
    return "something else; it reads safetensors files and what torch.save writes"


def _read_pickle(path: Path) -> dict[str, Tensor]:
    is_zip = zipfile.is_zipfile(path)
    pickles = _check_zip(path) if is_zip else None
    try:
        _check_opcodes(path, pickles)
        # Only the zip format, PyTorch's own since 1.6, can be mapped into memory.
        with torch.serialization.safe_globals(_HARMLESS):
            # First without memory for the tensors, whose sizes a pickle may claim.
            with FakeTensorMode():
                _check_storages(path, torch.load(path, map_location="cpu", weights_only=True))
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _NotOpened:
        raise
    except Exception as error:  # damaged or hostile pickles may raise anything
        foreign = re.search(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) (\S+)", str(error))
        if foreign:
            raise ValueError(
                f"{path}: this pickle holds {foreign[1]}, not plain tensors, and was not opened, since a pickle can "
                'run code; if you trust it, save its weights alone, and convert that: python -c "import torch; content '
                f"= torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
                "torch.save(content.get('state_dict', content), 'weights.pth')\""
            ) from error
        # Only the reason: PyTorch's message goes on to recommend loading without protection.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        raise ValueError(
            f"{path}: not a readable checkpoint of plain tensors ({reason.splitlines()[0]}); download it again"
        ) from error
    for container in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
            break
    return _plain_tensors(path, content)


_DENSE = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")


class _NotOpened(ValueError):
    """A pickle that asks for memory which its bytes do not account for."""


def _check_opcodes(path: Path, pickle: bytes | None) -> None:
    """Refuse a pickle that makes byte arrays, whose length is any number it says; `None`: read the file's start."""
    # The format before the zip archives is several pickles, the last of which lists the storages, and then the numbers.
    stream = io.BytesIO(pickle) if pickle is not None else open(path, "rb")  # noqa: SIM115 - closed below
    with stream:
        for _ in range(1 if pickle is not None else 5):
            last = ""
            for opcode, argument, _ in pickletools.genops(stream):
                if isinstance(argument, str):
                    last = argument.rpartition(" ")[2]  # GLOBAL has "module name"; STACK_GLOBAL takes the last text
                if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                    if last == "bytearray":
                        raise _NotOpened(f"{path}: this pickle makes byte arrays, not plain tensors; it was not opened")
                    if last.startswith("_rebuild_") and last not in _DENSE:
                        raise _NotOpened(f"{path}: this pickle holds tensors that are not plain dense numbers ({last})")
                if opcode.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > os.path.getsize(path):
                    raise _NotOpened(f"{path}: this pickle refers to more objects than it has bytes; it was not opened")


def _check_storages(path: Path, content: Any) -> None:
    """Refuse tensors (without memory) whose storages are larger than their file."""
    sizes, waiting, seen = {}, [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                sizes[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    if sum(sizes.values()) > os.path.getsize(path):
        raise _NotOpened(
            f"{path}: its tensors claim {sum(sizes.values())} bytes, but the file has {os.path.getsize(path)}; it was "
            "not opened"
        )


def _check_zip(path: Path) -> bytes:
    """Refuse a compressed archive; the pickle in it."""
    # PyTorch stores its archives uncompressed; a compressed one could unpack to any size.
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise ValueError(f"{path}: a damaged archive; download it again") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or sum(
        member.file_size for member in members
    ) > os.path.getsize(path):
        raise ValueError(
            f"{path}: this archive is compressed, as no checkpoint of PyTorch is; unpack it and name the checkpoint "
            "in it"
        )
    pickles = [member for member in members if member.filename.endswith("data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{path}: this archive holds {len(pickles)} files data.pkl, not one; download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(pickles[0])
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: a damaged archive; download it again") from error


def _plain_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        kind = "an empty table" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"{path} holds {kind}, not a table of tensors; save the state dict alone and convert that")
    tensors = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: entry {shown(name)} is a {type(value).__name__}, not a tensor; save the state dict alone and "
                "convert that"
            )
        plain = value.layout == torch.strided and value.device.type == "cpu"
        # An expanded view of a few bytes may claim any size.
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: tensor {shown(name)} of shape {tuple(value.shape)} is not plain dense numbers")
        tensors[name] = value.detach()
    return tensors


def strip_prefixes(state_dict: Mapping[str, Tensor], prefixes: Sequence[str] = ("network.",)) -> dict[str, Tensor]:
    """Parameter names without `module.` (data parallel, if all have it), `_orig_mod.` (`torch.compile`) and `prefixes`.

    Raises:
        ValueError: two parameters end up with one name.
    """
    plain: dict[str, str] = {}
    compiled = {name: re.sub(r"(^|\.)_orig_mod\.", r"\1", name) for name in state_dict}
    parallel = all(name.startswith("module.") for name in compiled.values())
    for original, name in compiled.items():
        if parallel:
            name = name.removeprefix("module.")
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        if name in plain:
            raise ValueError(
                f"the checkpoint holds {shown(name)} twice, as {shown(plain[name])} and as {shown(original)}"
            )
        plain[name] = original
    return {name: state_dict[original] for name, original in plain.items()}
