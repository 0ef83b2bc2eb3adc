"""Strangers' checkpoints: what torch.save writes comes back bit for bit, and nothing that a pickle can say is run."""

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conversion.restricted_pickle import MAX_PICKLE_BYTES, Shell
from conversion.safe_load import StoredTensor, list_tensors, load_checkpoint


MODULE_CLASSES = [
    *("torch.nn.modules.container.Sequential", "torch.nn.modules.linear.Linear"),
    *("torch.nn.modules.batchnorm.BatchNorm1d", "torch.nn.modules.activation.ReLU"),
]
both_formats = pytest.mark.parametrize("use_zip", [True, False], ids=["zip", "legacy"])


def save(content, path, use_zip=True):
    torch.save(content, path, _use_new_zipfile_serialization=use_zip)
    return path


def assert_same(loaded, saved):
    if isinstance(saved, torch.Tensor):
        assert type(loaded) is StoredTensor and loaded.dtype == saved.dtype and loaded.shape == saved.shape
        read = loaded.read()
        assert read.is_contiguous() and read.dtype == saved.dtype and read.equal(saved.detach())
    elif isinstance(saved, dict):
        assert list(loaded) == list(saved)
        for key, value in saved.items():
            assert_same(loaded[key], value)
    elif isinstance(saved, list | tuple):
        assert type(loaded) is (tuple if isinstance(saved, tuple) else list) and len(loaded) == len(saved)
        for one, other in zip(loaded, saved, strict=True):
            assert_same(one, other)
    else:
        assert type(loaded) is type(saved) and loaded == saved


# ------------------------------------------------------------------------------------------------- what comes back


@both_formats
def test_containers_numbers_and_tensors_come_back(tmp_path, use_zip):
    base = torch.arange(24.0).view(4, 6)
    content = {
        "state_dict": OrderedDict(a=base, transposed=base.t(), part=base[1:3, ::2], scalar=torch.tensor(3.5)),
        "tied": [base, nn.Parameter(base)],
        "empty": torch.zeros(0, 3),
        "numbers": (1, -5, 2**70, 10**400, 2.5, float("inf"), True, None),
        "strings": ["", "ёлка", "🦊" * 100, b"bytes \xff"],
        "set": {1, 2},
        "long": list(range(3000)),
        "default": defaultdict(dict),
        3: torch.Size([2, 3]),
        ("a", 1): torch.device("cpu").type,
    }
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8):
        content[str(dtype)] = torch.tensor([1, 2, 3]).to(dtype)
    content |= {"uint8": torch.tensor([200, 1], dtype=torch.uint8), "bool": torch.tensor([True, False])}
    loaded = load_checkpoint(save(content, tmp_path / "file.pt", use_zip)).content
    assert_same(loaded, {**content, "default": {}, 3: (2, 3)})


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_views_of_all_shapes_come_back(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("views") / "file.pt"
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    tensor = torch.arange(float(np.prod(shape))).view(shape).permute(*data.draw(st.permutations(range(len(shape)))))
    for dimension, size in enumerate(tensor.shape):
        start = data.draw(st.integers(0, size - 1))
        tensor = tensor.narrow(dimension, start, data.draw(st.integers(0, size - start)))
    assert_same(load_checkpoint(save({"x": tensor}, path, data.draw(st.booleans()))).content, {"x": tensor})


@both_formats
def test_a_module_saved_whole_becomes_a_shell(tmp_path, use_zip):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2, bias=False)))
    checkpoint = load_checkpoint(save(module, tmp_path / "module.pkl", use_zip), MODULE_CLASSES)
    assert type(checkpoint.content) is Shell and checkpoint.content.name == "torch.nn.modules.container.Sequential"
    assert_same(list_tensors(checkpoint.content), dict(module.state_dict()))
    with pytest.raises(ValueError, match=r"refused: it names 'torch.nn.modules.container.Sequential'"):
        load_checkpoint(tmp_path / "module.pkl", MODULE_CLASSES[1:])


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    path = save({"a": torch.ones(10), "b": torch.ones(1000)}, tmp_path / "file.pt")
    tensors = list_tensors(load_checkpoint(path).content)
    os.truncate(path, 1500)
    assert tensors["a"].read().sum() == 10
    with pytest.raises(OSError, match="is cut"):
        tensors["b"].read()


# -------------------------------------------------------------------------------------------- what is refused by name


class Evil:
    """Pickles as whatever `reduced` says."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def make_parameter(state):
    """A parameter with an attribute, which is pickled with it."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.more = state
    return parameter


def marker(tmp_path):
    return str(tmp_path / "was_run")


HOSTILE = {
    "reduce": lambda path: Evil(os.system, (f"touch {path}",)),
    "eval": lambda path: Evil(eval, (f"open({path!r}, 'w')",)),
    "getattr": lambda path: Evil(getattr, ("", "format")),
    "open": lambda path: Evil(open, (path, "w")),
    "build": lambda path: Evil(Counter, (), {"__class__": 1}),
    "partial": lambda path: Evil(__import__("functools").partial, (os.system, f"touch {path}")),
    "subprocess": lambda path: Evil(subprocess.check_output, (["touch", path],)),
    "torch_load": lambda path: Evil(torch.load, (path,)),
    "beside_a_tensor": lambda path: (nn.Parameter(torch.ones(2)), Evil(os.system, (f"touch {path}",))),
    "in_parameter_state": lambda path: make_parameter(Evil(os.system, (f"touch {path}",))),
    "numpy": lambda path: np.array([Evil(os.system, (f"touch {path}",))], dtype=object),
}


@both_formats
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_objects_are_refused_by_name_and_not_run(tmp_path, kind, use_zip):
    hostile = HOSTILE[kind](marker(tmp_path))
    path = save({"state_dict": {"x": torch.ones(2)}, "extra": hostile}, tmp_path / "file.pt", use_zip)
    with pytest.raises(ValueError, match=r"is refused: it names '[\w.]+'"):
        load_checkpoint(path, MODULE_CLASSES)
    assert not os.path.exists(marker(tmp_path))


def write_zip(path, data, members=(), **options):
    """A file in the zip format around any pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in dict(members).items():
            archive.writestr(f"archive/{name}", content)
    return path


FLOATS = b"ctorch\nFloatStorage\n"
STORAGE = b"(X\x07\x00\x00\x00storage" + FLOATS + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
NAMED = "torch.nn.modules.linear.Linear"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"cos\nsystem\n(X\x04\x00\x00\x00true" + b"tR.", "'os.system'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "'os.system'"),
        (b"cposix\nsystem\n.", "'posix.system'"),
        (b"(S'true'\nios\nsystem\n.", "uses INST"),
        (b"(cos\nsystem\nS'true'\no.", "'os.system'"),
        (b"\x82\x01.", "uses EXT1"),
        (b"P1\n.", "uses PERSID"),
        (b"X\x01\x00\x00\x00aQ.", "persistent id"),
        (b"(X\x06\x00\x00\x00modulecos\nsystem\ntQ.", "'os.system'"),
        (b"(X\x07\x00\x00\x00storageX\x01\x00\x00\x00aX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ.", "storage of"),
        (FLOATS + b")R.", "only a word"),
        (FLOATS + b"}b.", "fills 'torch.FloatStorage'"),
        (REBUILD + b"}b.", "fills 'torch._utils._rebuild_tensor_v2'"),
        (REBUILD + b"(K\x01K\x00)))tR.", "no storage"),
        (FLOATS + b")\x81.", "makes an object of 'torch.FloatStorage'"),
        (b"K\x01)R.", "calls a int"),
        (b"cbuiltins\ngetattr\n.", "'builtins.getattr'"),
        (b"c__builtin__\neval\n.", "'builtins.eval'"),
        (b"ctorch\nnn.Module.__init__\n.", "'torch.nn.Module.__init__'"),
        (b"\x80\x04\x8c\x05torch\x8c\x0d_utils.os.sys\x93.", "'torch._utils.os.sys'"),
        (b"ctorch.nn.modules.linear\nLinear\n)\x81}bb.", "damaged"),
        (b"ctorch.nn.modules.linear\nLinear\n)\x81}b}b.", "fills 'torch.nn.modules.linear.Linear' with a state"),
        (b"ctorch.nn.modules.linear\nLinear\n)\x81K\x01a.", "as if it were a list"),
        (b"}(K\x01]K\x02u.", "damaged"),
        (b"}]K\x01s.", "uses a list as a key"),
        (b"})\x85K\x01s.", "uses a tuple as a key"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00rottR.", "no known way"),
    ],
)
def test_hostile_opcodes_are_refused(tmp_path, data, words):
    path = write_zip(tmp_path / "file.pt", data, {"data/0": bytes(16)})
    with pytest.raises((ValueError, OSError), match=words):
        load_checkpoint(path, [NAMED])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (b"K\x00K\x05\x85K\x01\x85", "reaches beyond"),
        (b"K\x01K\x04\x85K\x01\x85", "reaches beyond"),
        (b"J\xff\xff\xff\xffK\x04\x85K\x01\x85", "offset -1"),
        (b"K\x00K\x02\x85J\xff\xff\xff\xff\x85", "strides"),
        (b"K\x00K\x02K\x02\x86K\x01\x85", "strides"),
        (b"K\x00\x88\x85K\x01\x85", "shape"),
        (b"K\x00X\x01\x00\x00\x00a\x85K\x01\x85", "shape"),
    ],
)
def test_tensors_that_reach_beyond_their_storage_are_refused(tmp_path, arguments, words):
    path = write_zip(tmp_path / "file.pt", REBUILD + b"(" + STORAGE + arguments + b"\x89)tR.", {"data/0": bytes(16)})
    with pytest.raises(ValueError, match=words):
        load_checkpoint(path)


def test_a_view_that_repeats_is_not_read(tmp_path):
    path = save({"x": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "file.pt")
    tensor = load_checkpoint(path).content["x"]
    assert tensor.shape == (10**6, 10**6)
    with pytest.raises(ValueError, match="repeat"):
        tensor.read()


# ------------------------------------------------------------------------------------------ bombs, cuts, other files


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bombs_are_refused_unread(tmp_path, method):
    path = write_zip(tmp_path / "file.pt", b"}.", {"data/0": bytes(10**6)}, compression=method)
    assert path.stat().st_size < 10**4
    with pytest.raises(ValueError, match="compressed"):
        load_checkpoint(path)


def test_a_pickle_that_asks_for_much_is_refused(tmp_path):
    with pytest.raises(OSError, match=f"more than {MAX_PICKLE_BYTES} bytes"):
        load_checkpoint(write_zip(tmp_path / "claim.pt", b"X\xff\xff\xff\xff" + bytes(100)))
    part = b"B" + struct.pack("<I", 2**20) + bytes(2**20) + b"0"  # a megabyte of bytes, thrown away again
    with pytest.raises(OSError, match=f"more than {MAX_PICKLE_BYTES} bytes"):
        load_checkpoint(write_zip(tmp_path / "long.pt", part * (MAX_PICKLE_BYTES // 2**20) + b"}."))
    # a memo index makes no array of its size
    assert load_checkpoint(write_zip(tmp_path / "memo.pt", b"}r\xff\xff\xff\xff.")).content == {}


# A tuple that holds itself twice, sixty times over: whatever walks all of it never ends.
NESTED = b")q\x01" + b"h\x01h\x01\x86q\x01" * 60


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (NESTED + b"ctorch\ndevice\nh\x01\x85R.", "device of no known kind"),
        (NESTED + b"(X\x07\x00\x00\x00storage" + FLOATS + b"h\x01X\x03\x00\x00\x00cpuK\x01tQ.", "no known name"),
        (NESTED + REBUILD + b"(" + STORAGE + b"K\x00h\x01h\x01tR.", "no counts"),
        (REBUILD + b"(" + STORAGE + b"K\x00(K\x00\x8a\x09" + b"\xff" * 8 + b"\x00t(K\x01K\x01ttR.", "no counts"),
        (b"(" + b"N" * 2**16 + b"lq\x010(" + b"ctorch\nSize\nh\x01\x85R" * 40 + b"l.", "copies more than"),
        (b"\x80\x04(" + b"\x8f" * 2**22 + b"l.", "more than 2097152 steps"),
    ],
    ids=["device", "storage", "shape", "size", "copies", "steps"],
)
def test_small_files_that_would_grow_are_refused(tmp_path, data, words):
    with pytest.raises(ValueError, match=words):
        load_checkpoint(write_zip(tmp_path / "file.pt", data, {"data/0": bytes(16)}))


def test_empty_state_dicts_nested_in_themselves_end(tmp_path):
    shared: dict = {}
    for _ in range(60):
        shared = {"left": shared, "right": shared}
    many = {"a" * 2**20: {f"{number}": {} for number in range(2**10)}}
    for content in (shared, many):
        with pytest.raises(ValueError, match="nested in itself, or too deep"):
            list_tensors(load_checkpoint(save(content, tmp_path / "file.pt")).content)


def test_state_dicts_nested_in_themselves_end(tmp_path):
    loop: dict = {}
    loop["again"] = loop
    shared: dict = {"leaf": torch.ones(1)}
    for _ in range(60):
        shared = {"left": shared, "right": shared}
    for content in (loop, shared):
        loaded = load_checkpoint(save(content, tmp_path / "file.pt")).content
        with pytest.raises(ValueError, match="nested in itself, or too deep"):
            list_tensors(loaded)


@both_formats
def test_files_cut_anywhere_are_refused(tmp_path, use_zip):
    content = {"a": torch.arange(20.0), "b": [torch.ones(3), "text"]}
    whole = save(content, tmp_path / "file.pt", use_zip).read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises((OSError, ValueError)):
            for tensor in list_tensors(load_checkpoint(path).content["a"]).values():
                tensor.read()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_only_what_is_promised(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "file.pt"
    raw = bytearray(save({"a": torch.arange(5.0), "b": [1, "x", {2}]}, path, data.draw(st.booleans())).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        content = load_checkpoint(path).content
        for value in content.values() if type(content) is dict else ():
            for tensor in list_tensors(value).values():
                tensor.read()
    except (OSError, ValueError):
        pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut or damaged|neither"),
        (b"hello", "neither as a zip file nor as a pickle"),
        (pickle.dumps({"a": 1}), "not one of torch.save"),
        (b"".join(map(pickle.dumps, [0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}])), "big-endian"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError), match=words):
        load_checkpoint(path)


def test_other_zip_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="TorchScript"):
        load_checkpoint(write_zip(tmp_path / "script.pt", b"}.", {"constants.pkl": b"."}))
    with pytest.raises(ValueError, match="big-endian"):
        load_checkpoint(write_zip(tmp_path / "big.pt", b"}.", {"byteorder": b"big"}))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a/b.txt", "")
    with pytest.raises(OSError, match="no data.pkl"):
        load_checkpoint(tmp_path / "other.zip")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"}.")
        archive.writestr("a/data.pkl", b"].")
    with pytest.raises(ValueError, match="two members"):
        load_checkpoint(tmp_path / "twice.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nothing.pt")


def test_a_member_that_lies_about_its_place_is_refused(tmp_path):
    data = b"}X\x01\x00\x00\x00a" + REBUILD + b"(" + STORAGE + b"K\x00K\x04\x85K\x01\x85\x89)tRs."
    path = write_zip(tmp_path / "file.pt", data, {"data/0": bytes(16)})
    assert load_checkpoint(path).content["a"].read().equal(torch.zeros(4))
    raw = bytearray(path.read_bytes())
    start = raw.rindex(b"PK\x01\x02")  # the last entry of the directory, and in it where its member begins
    raw[start + 42 : start + 46] = struct.pack("<I", len(raw) - 40)
    path.write_bytes(raw)
    with pytest.raises(OSError, match="cut or damaged"):
        load_checkpoint(path)


# ------------------------------------------------------------------------------------------------------- the memory

MEASURE = """
import resource, sys
from pathlib import Path
import torch
from conversion.folders import Conversion, Facts, Part, make_part, write_folder
from conversion.safe_load import list_tensors, load_checkpoint
from hf_dalle import DalleVQGAN

with torch.device("meta"):
    model = DalleVQGAN(vocab_size=16, block_out_channels=(32,), attention_levels=())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensors = list_tensors(load_checkpoint(sys.argv[1]).content)
part = make_part(model, tensors)
part.keys.target = {name: tensor.shape for name, tensor in tensors.items()}
for name in tensors:
    part.keys.add(name, name)
conversion = Conversion({"": part}, Facts("", "", "", ""), [])
conversion.check()
write_folder(Path(sys.argv[2]), conversion, max_shard_bytes=10**8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_peak_memory_is_that_of_the_largest_tensor(tmp_path):
    num_tensors, num_bytes = 30, 10**7
    content = {str(index): torch.full((num_bytes // 4,), float(index)) for index in range(num_tensors)}
    path = save(content, tmp_path / "file.pt")
    assert path.stat().st_size > 3e8
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "out")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    peak = int(done.stdout)
    assert peak < 6 * num_bytes < path.stat().st_size / 4
    index = (tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    assert '"total_size": 300000000' in index
