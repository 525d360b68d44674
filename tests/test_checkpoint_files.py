"""Reading foreign checkpoints: what is there comes back bit for bit, and what is hostile is refused by name."""

import collections
import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from hf_segvit.atomic_files import complete_folder
from hf_segvit.conversion import checkpoint_files
from hf_segvit.conversion.checkpoint_files import find_checkpoint, read_checkpoint, strip_prefixes
from hf_segvit.weight_checks import check_complete, check_weights, common_dtype

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}


def assert_same(state_dict, expected=WEIGHTS):
    assert state_dict.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state_dict[name].dtype == tensor.dtype
        assert torch.equal(state_dict[name], tensor)


def write_safetensors(path, header, data=b"", header_length=None):
    """A safetensors file by hand; the header a table or raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_length is None else header_length) + text + data)
    return path


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pth", "x.ckpt"])
def test_every_format_gives_the_same_tensors(tmp_path, name):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(WEIGHTS, path)
    elif name.endswith(".pth"):
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"state_dict": WEIGHTS, "epoch": 3} if name.endswith(".ckpt") else WEIGHTS, path)
    assert_same(read_checkpoint(path))


def test_parameters_and_ordered_tables_are_read_too(tmp_path):
    layer = torch.nn.Linear(3, 2)
    torch.save(collections.OrderedDict(layer.named_parameters()), tmp_path / "x.pt")
    read = read_checkpoint(tmp_path / "x.pt")
    assert torch.equal(read["weight"], layer.weight)
    assert not read["weight"].requires_grad


@pytest.mark.parametrize("format_name", ["safetensors", "bin"])
def test_shards_are_put_together(tmp_path, format_name):
    weight_map = {}
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        file = tmp_path / f"part-{number}.{format_name}"
        save_file({name: tensor}, file) if format_name == "safetensors" else torch.save({name: tensor}, file)
        weight_map[name] = file.name
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read_checkpoint(index))
    assert find_checkpoint(tmp_path) == index


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "missing.safetensors"}, r"missing\.safetensors.*not beside it"),
        ({"a.weight": "../outside.safetensors"}, r"'\.\./outside\.safetensors', which is not a file beside it"),
        ({"a.weight": "/etc/passwd"}, "not a file beside it"),
        ({"a.weight": "..\\outside.safetensors"}, "not a file beside it"),
        ({"a.weight": "C:outside.safetensors"}, "not a file beside it"),
        ({"a.weight": ".."}, "not a file beside it"),
        ({"a.weight": 7}, "not a file beside it"),
        ({"a.weight": "index.json"}, "no checkpoint file"),
        ({"a.weight": "here.safetensors", "b.bias": "here.safetensors", "c": "here.safetensors"}, "lacks 'c'"),
        ({"b.bias": "here.safetensors"}, "also holds 'a.weight'"),
        ({}, "no table"),
        (["a.weight"], "no table"),
    ],
)
def test_hostile_shard_indexes_are_refused(tmp_path, weight_map, message):
    save_file(WEIGHTS, tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(WEIGHTS, folder / "here.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(index)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map"', "[" * 100_000, '{"metadata": {}}'])
def test_indexes_that_are_no_json_table_are_refused(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: (cannot be read|holds a list|its weight_map is None)"):
        read_checkpoint(index)


@pytest.mark.parametrize("keep", [0, 5, 40, 100, -1])
def test_truncated_safetensors_are_refused(tmp_path, keep):
    save_file(WEIGHTS, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"cut\.safetensors.*(too short|but the file has|cut short|damaged)"):
        read_checkpoint(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({}, b"", 2**63, "claims 9223372036854775808 bytes"),
        ({}, b"", 200_000_000, "more than the 16777216 allowed"),
        ({}, b"", 50, "but the file has"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), None, "'b' at byte 4 overlaps tensor 'a'"),
        ({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, bytes(8), None, "overlaps"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12), None, "leaves a gap"),
        ({"a": entry(0, 4, [1])}, bytes(8), None, "4 bytes after the last tensor"),
        ({"a": entry(0, 8, [2])}, bytes(4), None, "ends at byte 8 of 4"),
        ({"a": entry(0, 4, [2])}, bytes(4), None, "does not fill its bytes"),
        ({"a": entry(4, 0, [1])}, bytes(4), None, "does not fill its bytes"),
        ({"a": entry(0, 2**62, [2**60])}, bytes(4), None, "ends at byte"),
        ({"a": entry(-4, 0, [1])}, bytes(4), None, "'a' has shape"),
        ({"a": entry(0, 4, [1.0])}, bytes(4), None, "'a' has shape"),
        ({"a": entry(0, 4, [True])}, bytes(4), None, "'a' has shape"),
        ({"a": entry(0, 4, [1], "F99")}, bytes(4), None, "dtype 'F99'"),
        ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), None, "lacks dtype, shape or data_offsets"),
        ({"a": 3}, bytes(4), None, "lacks dtype"),
        (b"[1]", b"", None, "not a table"),
        (b"\xff\xfe", b"", None, "cannot be read"),
        (b"[" * 100_000, b"", None, "cannot be read"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
            None,
            "'a' is listed twice",
        ),
    ],
)
def test_hostile_safetensors_are_refused(tmp_path, header, data, length, message):
    path = write_safetensors(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


class Touch:
    """What a hostile pickle does: run a command when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    for zipped in (True, False):
        path, trace = tmp_path / f"x{zipped}.bin", tmp_path / "trace"
        torch.save({"a": torch.zeros(1), "b": Touch(trace)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"holds \S*system, not plain tensors, and was not opened"):
            read_checkpoint(path)
        assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(1), "b": 3}, "entry 'b' is a int, not a tensor"),
        ({"a": [torch.zeros(1)]}, "entry 'a' is a list"),
        ({3: torch.zeros(1)}, "entry 3"),
        ([torch.zeros(1)], "holds a list"),
        ({}, "holds an empty table"),
        ({"state_dict": {"a": "text"}}, "entry 'a' is a str"),
        ({"a": torch.zeros(1).expand(10**12)}, "'a' of shape .* is not plain dense numbers"),
        ({"a": torch.eye(3).to_sparse()}, "not plain dense numbers"),
    ],
)
def test_a_pickle_of_other_than_plain_tensors_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "x.bin")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_is_damaged_is_refused(tmp_path):
    torch.save(WEIGHTS, tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    for content in (b"", b"PK\x03\x04", b"not a pickle", whole[: len(whole) // 2], pickle.dumps({"a": 1})):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.bin.*(not a readable checkpoint|not plain tensors|not a tensor)"):
            read_checkpoint(tmp_path / "x.bin")


def test_a_compressed_archive_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(100_000)}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(tmp_path / "x.bin")


def test_the_size_cap_counts_all_shards_and_names_the_flag(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(100)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    size = os.path.getsize(tmp_path / "1.safetensors")
    read_checkpoint(tmp_path / "1.safetensors", max_bytes=size)
    read_checkpoint(index, max_bytes=2 * size)
    with pytest.raises(ValueError, match="--max-gib"):
        read_checkpoint(index, max_bytes=2 * size - 1)


def test_finding_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "last.ckpt").touch()
    assert find_checkpoint(tmp_path).name == "last.ckpt"
    (tmp_path / "best.ckpt").touch()
    with pytest.raises(ValueError, match=r"several checkpoints; name one: best\.ckpt, last\.ckpt"):
        find_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "model.safetensors").touch()
    assert find_checkpoint(tmp_path).name == "model.safetensors"
    assert find_checkpoint(tmp_path, ("pytorch_model.bin",)).name == "pytorch_model.bin"
    (tmp_path / "x.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a checkpoint this reads"):
        read_checkpoint(tmp_path / "x.onnx")


def test_finding_a_checkpoint_of_the_hub(tmp_path, monkeypatch):
    """With a stand-in for the download, which is Transformers' own."""
    asked = []

    def cached_file(repository, name, revision=None, **quiet):
        asked.append((repository, name, revision))
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    monkeypatch.setattr(checkpoint_files, "cached_file", cached_file)
    with pytest.raises(ValueError, match=r"owner/name has none of model\.safetensors"):
        find_checkpoint("owner/name")
    save_file(WEIGHTS, tmp_path / "part.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, "part.safetensors")}))
    asked.clear()
    assert_same(read_checkpoint(find_checkpoint("owner/name", revision="v1")))
    assert asked[-1] == ("owner/name", "part.safetensors", "v1")  # fetched with the index
    index.write_text(json.dumps({"weight_map": {"a.weight": "../part.safetensors"}}))
    asked.clear()
    with pytest.raises(ValueError, match="not a file beside it"):
        find_checkpoint("owner/name")
    assert all(name.startswith("model.") for _, name, _ in asked)
    for source in ("../name", "a/b/c", "name"):
        with pytest.raises(ValueError, match="nor the id owner/name"):
            find_checkpoint(source)


def test_prefixes_are_stripped():
    tensor = torch.zeros(1)
    assert strip_prefixes({"network._orig_mod.q.weight": tensor, "criterion.x": tensor}).keys() == {
        "q.weight",
        "criterion.x",
    }
    assert strip_prefixes({"_orig_mod.module.network.a": tensor}).keys() == {"a"}
    assert strip_prefixes({"module.a": tensor, "module.module.b": tensor}).keys() == {"a", "module.b"}
    assert strip_prefixes({"module.a": tensor, "b": tensor}).keys() == {"module.a", "b"}
    with pytest.raises(ValueError, match=r"holds 'a' twice, as 'a' and as 'network\.a'"):
        strip_prefixes({"a": tensor, "network.a": tensor})


def test_weights_that_are_no_numbers_are_named():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"here: b holds NaN or infinity \(1 of 4 values\)"):
            check_weights({"a": torch.ones(3), "b": torch.tensor([0.0, bad, 1.0, 2.0])}, "here")
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool):
        with pytest.raises(ValueError, match="here: a has the dtype"):
            check_weights({"a": torch.zeros(3, dtype=dtype)}, "here")


def test_weights_must_be_exactly_those_of_the_model():
    model = torch.nn.Linear(3, 2)
    check_complete(model.state_dict(), model.state_dict(), "")
    cases = {
        "1 parameters are missing, such as 'bias'": {"weight": model.weight},
        "1 unknown to the model, such as 'extra'": {**model.state_dict(), "extra": model.bias},
        r"'bias' has shape \(3,\) instead of \(2,\)": {"weight": model.weight, "bias": torch.zeros(3)},
    }
    for message, state_dict in cases.items():
        with pytest.raises(ValueError, match=f"{message}; try harder"):
            check_complete(state_dict, model.state_dict(), "try harder")


def test_the_common_dtype():
    half, single = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    assert common_dtype({"a": half, "b": half}) == torch.bfloat16
    assert common_dtype({"a": half, "b": single}) == torch.float32
    assert common_dtype({"a": single.double()}) == torch.float32


def write_and_fail(target, error):
    with complete_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("half")
        raise error


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(target, KeyboardInterrupt)
    assert not target.exists()
    assert list(target.parent.iterdir()) == []
    with complete_folder(target) as folder:
        (folder / "config.json").write_text("new")
        assert not target.exists()
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert (target / "config.json").stat().st_mode & 0o777 == target.stat().st_mode & 0o666


def test_only_model_folders_are_replaced_and_only_on_request(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    with complete_folder(target) as folder:  # an empty folder is no loss
        (folder / "config.json").write_text("old")
    with pytest.raises(ValueError, match="--overwrite"), complete_folder(target):
        pytest.fail("must not get here")
    with pytest.raises(RuntimeError):
        write_and_fail(target, RuntimeError)
    assert (target / "config.json").read_text() == "old"
    with complete_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.jpg").touch()
    file = tmp_path / "file"
    file.touch()
    link = tmp_path / "link"
    link.symlink_to(target)
    for path, message in ((photos, "is no model folder"), (file, "not a folder"), (link, "not a folder")):
        with pytest.raises(ValueError, match=message), complete_folder(path, overwrite=True):
            pytest.fail("must not get here")
    assert (photos / "1.jpg").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "model", "photos"]
