"""Strangers' checkpoints, read without running anything in them: PyTorch's files, of the zip format and the older one.

`load_checkpoint` reads a file's pickle through `restricted_pickle.py`; its tensors stay in the file until they are
asked for, one at a time. What a family's keys mean lives in `families/`.
"""

import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from .restricted_pickle import BoundedReader, Machine, Name, Shell, make_set


_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER_BYTES = 30
_MEMBERS = ("_parameters", "_buffers", "_modules")
_MAX_DEPTH, _MAX_TENSORS, _MAX_NAME, _MAX_DIMS = 100, 2**16, 1000, 64

_STORAGE_DTYPES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


class Storage:
    """Where a tensor's elements lie in a file; `start` is found after the pickle is read."""

    def __init__(self, path: Path, dtype: torch.dtype, numel: int):
        self.path, self.dtype, self.numel, self.start = path, dtype, numel, None


class StoredTensor:
    """
    A tensor that is still in its file.

    Attributes:
        dtype (`torch.dtype`): of its elements.
        shape (`torch.Size`): of what [`~StoredTensor.read`] returns.
    """

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        numbers = [offset, *shape, *strides]
        # Words never hold what a file nests: a tuple nested sixty times in itself would never be written out.
        if len(numbers) > 1 + 2 * _MAX_DIMS or any(type(number) is not int or number >= 2**63 for number in numbers):
            raise ValueError("a tensor has a shape, strides or an offset that are no counts")
        if len(shape) != len(strides) or any(number < 0 for number in numbers):
            raise ValueError(f"a tensor has the shape {shape}, strides {strides} and offset {offset}")
        self.storage, self.offset, self.strides = storage, offset, strides
        self.dtype, self.shape = storage.dtype, torch.Size(shape)
        # How many elements of the storage it reaches over.
        self.span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 in shape:
            self.span = 0
        if offset + self.span > storage.numel:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {storage.numel} elements")

    def read(self) -> torch.Tensor:
        """
        Reads it from its file, anew at each call.

        Raises:
            OSError: if the file became shorter.
            ValueError: for a tensor that repeats its storage, which is larger here than in its file.
        """
        if self.span == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.shape.numel() > self.storage.numel:
            raise ValueError(
                f"{self.storage.path}: a tensor of {self.shape.numel()} elements is stored as"
                f" {self.storage.numel}, which repeat."
            )
        start = self.storage.start + self.offset * self.dtype.itemsize
        num_bytes = self.span * self.dtype.itemsize
        data = np.fromfile(self.storage.path, np.uint8, count=num_bytes, offset=start)
        if len(data) != num_bytes:
            raise OSError(f"{self.storage.path} is cut: {num_bytes} bytes at {start} are not there.")
        return torch.from_numpy(data).view(self.dtype).as_strided(self.shape, self.strides).contiguous()


class Checkpoint(NamedTuple):
    """
    What a file holds.

    Attributes:
        path (`Path`): the file.
        content: containers, numbers, strings, [`Name`], [`Shell`], and [`StoredTensor`] for its tensors.
    """

    path: Path
    content: Any


def load_checkpoint(path: str | Path, classes: Collection[str] = ()) -> Checkpoint:
    """
    Reads a checkpoint that `torch.save` wrote, with any torch from 0.4 on, and runs nothing of it.

    Args:
        path (`str` or `Path`): the file.
        classes (`Collection[str]`):
            Names that are allowed beside tensors and containers, as "dall_e.encoder.Encoder". Their objects become
            inert [`Shell`]s.

    Returns:
        [`Checkpoint`]

    Raises:
        OSError: if the file is not there, cut or damaged.
        ValueError: for what is refused: any other name, opcodes and zip members that no checkpoint needs.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
            file.seek(0)
            read = _read_zip if magic == _ZIP_MAGIC else _read_legacy
            return Checkpoint(path, read(path, file, classes))
    except ValueError as error:
        raise ValueError(f"{path} is refused: {error}.") from error
    except (OSError, zipfile.BadZipFile, NotImplementedError, struct.error, EOFError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it is not there, or cannot be read: the system's own words
        raise OSError(f"{path} cannot be read as a PyTorch checkpoint: {error}.") from error


def list_tensors(content: Any, attributes: set[str] | None = None) -> dict[str, StoredTensor]:
    """
    The tensors of a state dict, or of a module saved whole, under their dotted names.

    Args:
        content: from a [`Checkpoint`]: dicts of dicts or of tensors, or a [`Shell`] of an `nn.Module`.
        attributes (`set[str]`, *optional*):
            Filled with the names of what modules hold beside parameters, buffers and modules, as `"training"`. None
            of it is a weight: where a tensor is among it, it is refused.

    Raises:
        ValueError: if something else is among them, or a name stands for two of them.
    """
    tensors: dict[str, StoredTensor] = {}
    waiting, num_seen = [("", content, 0)], 0
    while waiting:
        prefix, value, depth = waiting.pop()
        num_seen += 1
        if depth > _MAX_DEPTH or num_seen + len(waiting) > 2 * _MAX_TENSORS or len(prefix) > _MAX_NAME:
            raise ValueError("A state dict is nested in itself, or too deep.")
        name = prefix.removesuffix(".")
        if type(value) is StoredTensor:
            if name in tensors:
                raise ValueError(f"{name} is there twice.")
            tensors[name] = value
            continue
        if type(value) is Shell:
            value = _list_members(value, name or "The module", set() if attributes is None else attributes)
        if type(value) is not dict or not all(type(key) is str for key in value):
            raise ValueError(f"{name or 'A state dict'} is a {type(value).__name__}, no tensor.")
        waiting.extend((f"{prefix}{key}.", part, depth + 1) for key, part in reversed(value.items()))
    return tensors


def _list_members(module: Shell, name: str, attributes: set[str]) -> dict[str, Any]:
    """A module's parameters, buffers and modules by name; its other attributes go to `attributes`."""
    state = module.state if type(module.state) is dict else {}
    members: dict[str, Any] = {}
    for group in _MEMBERS:
        part = state.get(group, {})
        if type(part) is not dict:
            raise ValueError(f"{name} is a {module.name!r} whose `{group}` is a {type(part).__name__}, no dict.")
        twice = [key for key in part if key in members]
        if twice:
            raise ValueError(f"{name} has two members of the name {twice[0]!r}.")
        members |= part
    if not all(group in state for group in _MEMBERS):
        raise ValueError(f"{name} is a {module.name!r} without {', '.join(_MEMBERS)}: no module, so no tensor.")
    for key in state.keys() - set(_MEMBERS):
        if _holds_tensor(state[key]):
            raise ValueError(f"{name} is a {module.name!r} with a tensor in {key!r}, beside its weights.")
        attributes.add(str(key))
    return {key: part for key, part in members.items() if part is not None}


def _holds_tensor(value: Any) -> bool:
    """Whether a tensor is anywhere in containers and shells, which may hold each other."""
    waiting, seen = [value], set()
    while waiting:
        part = waiting.pop()
        if type(part) is StoredTensor:
            return True
        if id(part) in seen:
            continue
        seen.add(id(part))
        if type(part) is dict:
            waiting.extend(part.values())
        elif type(part) in (list, tuple):
            waiting.extend(part)
        elif type(part) is Shell:
            waiting += [part.args, part.state]
    return False


# ------------------------------------------------------------------------------------------------- the two formats


def _read_zip(path: Path, file: BinaryIO, classes: Collection[str]) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {}
        for info in archive.infolist():
            if info.filename in members:
                raise ValueError(f"it has two members {info.filename!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise ValueError(f"its member {info.filename!r} is compressed or encrypted, as torch.save's never are")
            members[info.filename] = info
    roots = [name.removesuffix("data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise OSError("it is a zip file with no data.pkl of torch.save, or several")
    root = roots[0]
    if f"{root}constants.pkl" in members:
        raise ValueError("it is a TorchScript program, not a checkpoint")
    if f"{root}byteorder" in members:
        start = _find_start(file, members[f"{root}byteorder"])
        file.seek(start)
        if file.read(6) != b"little":
            raise ValueError("its numbers are big-endian")
    storages: dict[str, Storage] = {}

    def load_persistent(identifier: Any) -> Storage:
        key, storage = _make_storage(path, identifier)
        if key not in storages:
            info = members.get(f"{root}data/{key}")
            if info is None or info.file_size != storage.numel * storage.dtype.itemsize:
                raise OSError(f"the elements of storage {key} are missing, or not as many as it says")
            storage.start = _find_start(file, info)
            storages[key] = storage
        return _same_storage(storages[key], storage)

    start = _find_start(file, members[f"{root}data.pkl"])
    file.seek(start)
    return Machine(_MAKERS, classes, load_persistent).run(BoundedReader(file))


def _find_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: its local header names itself again, with a length of its own."""
    position = file.tell()
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    name_length, extra_length = struct.unpack("<HH", header[26:])
    start = info.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length
    size = file.seek(0, 2)
    file.seek(position)
    if header[:4] != _ZIP_MAGIC or start + info.file_size > size:
        raise OSError(f"its member {info.filename!r} is cut or damaged")
    return start


def _read_legacy(path: Path, file: BinaryIO, classes: Collection[str]) -> Any:
    storages: dict[str, Storage] = {}

    def refuse(identifier: Any):
        raise ValueError("there is a persistent id where there should be none")

    def load_persistent(identifier: Any) -> Storage | Name:
        if type(identifier) is tuple and len(identifier) == 4 and identifier[0] == "module":
            return identifier[1]  # a module's class with its source code, which is not looked at
        key, storage = _make_storage(path, identifier)
        return _same_storage(storages.setdefault(key, storage), storage)

    def run(load=refuse, allowed: Collection[str] = ()) -> Any:
        return Machine(_MAKERS, allowed, load).run(BoundedReader(file))

    if file.read(1) not in (b"\x80", b""):
        raise OSError("it begins neither as a zip file nor as a pickle (files of torch before 0.1.10 are not read)")
    file.seek(0)
    if run() != _LEGACY_MAGIC or run() != _LEGACY_PROTOCOL:
        raise ValueError("it is a pickle, but not one of torch.save")
    system = run()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    content = run(load_persistent, classes)
    keys = run()
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise OSError("its list of storages is damaged")
    position, end = file.tell(), file.seek(0, 2)
    for key in keys:
        storage = storages.get(key)
        file.seek(position)
        count = file.read(8)
        if storage is None or len(count) != 8 or struct.unpack("<q", count)[0] != storage.numel:
            raise OSError(f"the elements of storage {key} are missing, or not as many as it says")
        storage.start = position + 8
        position = storage.start + storage.numel * storage.dtype.itemsize
        if position > end:
            raise OSError(f"the elements of storage {key} are cut")
    missing = [key for key, storage in storages.items() if storage.start is None]
    if missing:
        raise OSError(f"the elements of storage {missing[0]} are missing")
    return content


def _make_storage(path: Path, identifier: Any) -> tuple[str, Storage]:
    """The key of a storage's persistent id, `("storage", type, key, device, numel)`, and the storage."""
    if type(identifier) is not tuple or len(identifier) not in (5, 6) or identifier[0] != "storage":
        raise ValueError("it has a persistent id that is no storage's")
    _, kind, key, _, numel, *view = identifier
    if type(kind) is not Name or kind.name not in _STORAGE_DTYPES:
        raise ValueError(f"it has a storage of {getattr(kind, 'name', 'no')!r} type")
    if type(key) is not str or type(numel) is not int or not 0 <= numel < 2**63 or view not in ([], [None]):
        raise ValueError("it has a storage of no known name or number of elements, or a view of one")
    return key, Storage(path, _STORAGE_DTYPES[kind.name], numel)


def _same_storage(known: Storage, again: Storage) -> Storage:
    if (known.dtype, known.numel) != (again.dtype, again.numel):
        raise ValueError("it describes one storage in two ways")
    return known


# ------------------------------------------------------------------------------------------- what names may make


def _make_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("it makes a tensor of what is no storage")
    return StoredTensor(storage, offset, shape, strides)


def _make_parameter(data: Any, *_: Any) -> StoredTensor:
    if type(data) is not StoredTensor:
        raise ValueError(f"it makes a parameter of a {type(data).__name__}")
    return data


def _make_dict(*arguments: Any) -> dict:
    pairs = arguments[0] if arguments and type(arguments[0]) is not Name else []  # a defaultdict's factory is a name
    if pairs:
        raise ValueError("it makes a dict of arguments")
    return {}


def _make_size(sizes: Any) -> tuple:
    if type(sizes) not in (tuple, list):
        raise ValueError("it makes a size of no numbers")
    return tuple(sizes)


def _make_device(kind: Any, index: Any = None) -> str:
    if type(kind) is not str or len(kind) > 20 or type(index) not in (int, type(None)):
        raise ValueError("it makes a device of no known kind")
    return kind if index is None else f"{kind}:{index}"


def _make_bytes(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("it encodes a text in no known way")
    return text.encode("latin1")


def _refuse_to_make(*_: Any):
    raise ValueError("it calls what is only a word: a type of storage or of numbers")


_MAKERS: Mapping[str, Any] = {
    **dict.fromkeys(_STORAGE_DTYPES, _refuse_to_make),
    **{str(dtype): _refuse_to_make for dtype in _STORAGE_DTYPES.values()},
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_parameter": _make_parameter,
    "torch._utils._rebuild_parameter_with_state": _make_parameter,
    "torch.Size": _make_size,
    "torch.device": _make_device,
    "collections.OrderedDict": _make_dict,
    "collections.defaultdict": _make_dict,
    "builtins.set": make_set,
    "builtins.dict": _make_dict,
    "_codecs.encode": _make_bytes,
}
