"""A pickle machine that runs nothing: it knows containers, numbers, strings and a table of names.

What a name in the table makes is the caller's (`safe_load.py`). Every other name, and every opcode that could reach
code, is refused. Python's own unpickler is not used: its REDUCE and BUILD call whatever lies on its stack.
"""

import pickletools
from collections.abc import Callable, Collection, Mapping
from typing import Any, BinaryIO, NamedTuple


MAX_PICKLE_BYTES = 2**24  # a checkpoint's pickle has some 200 bytes a tensor; lists of one byte each take 56 in memory
MAX_STEPS = 2**21  # some 30 a tensor; what a step makes takes 216 bytes at most, beside what it read
MAX_COPIED = 2**20  # elements of what names are called with, which a file may hold once and call with often
_MARK = object()

_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Name(NamedTuple):
    """A class or function that a pickle names, as a word; nothing is imported."""

    name: str


class Shell:
    """
    An object of a class that is allowed by name: what the pickle says of it, and no behaviour.

    Attributes:
        name (`str`): module and class, as "dall_e.encoder.Encoder".
        args (`tuple`): what it would be made with.
        state: what it would be filled with, for most classes its attributes by name; `None` where there is nothing.
    """

    def __init__(self, name: str, args: tuple):
        self.name, self.args, self.state = name, args, None


class BoundedReader:
    """Reads from a file, up to `MAX_PICKLE_BYTES` in all: a length that a file claims allocates no more."""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, MAX_PICKLE_BYTES

    def read(self, num_bytes: int) -> bytes:
        if num_bytes > self.left:
            raise ValueError(f"more than {MAX_PICKLE_BYTES} bytes are asked for")
        return self._count(self.file.read(num_bytes))

    def readline(self) -> bytes:
        return self._count(self.file.readline(self.left))

    def _count(self, data: bytes) -> bytes:
        self.left -= len(data)
        return data


class Machine:
    """
    Builds one pickle's content.

    Args:
        makers (`Mapping[str, Callable]`): what a name makes of arguments; these check them, and raise `ValueError`.
        classes (`Collection[str]`): names whose objects become a [`Shell`].
        load_persistent (`Callable`): what a persistent id stands for.
    """

    def __init__(self, makers: Mapping[str, Callable], classes: Collection[str], load_persistent: Callable):
        self.makers, self.classes, self.load_persistent = makers, classes, load_persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.num_copied = 0

    def run(self, reader: BoundedReader) -> Any:
        """
        Raises:
            ValueError: for what is refused, by name.
            OSError: for a pickle that is cut or damaged.
        """
        operations = pickletools.genops(reader)
        for _ in range(MAX_STEPS):
            try:
                operation, argument, _ = next(operations)
            except (ValueError, StopIteration) as error:
                raise OSError(f"its pickle is cut or damaged ({error})") from error
            try:
                if operation.name == "STOP":
                    return self.pop()
                self.step(operation.name, argument)
            except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise OSError(f"its pickle is damaged ({operation.name}: {error!r})") from error
        raise ValueError(f"it takes more than {MAX_STEPS} steps")

    def step(self, operation: str, argument: Any) -> None:
        if operation in _LITERALS:
            self.stack.append(argument)
        elif operation in _CONSTANTS:
            self.stack.append(_CONSTANTS[operation]())
        elif operation in _TUPLES:
            self.stack.append(tuple([self.pop() for _ in range(_TUPLES[operation])][::-1]))
        elif operation in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif operation == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif operation in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif operation not in ("PROTO", "FRAME"):
            method = getattr(self, f"do_{operation.lower()}", None)
            if method is None:
                raise ValueError(f"it uses {operation}, which no checkpoint needs")
            method(argument)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise IndexError("a mark where a value is expected")
        return value

    def pop_to_mark(self) -> list:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    # Containers. Keys are checked: the hash of a tuple nested sixty times in itself would never be ready.

    def do_tuple(self, _: None) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def do_list(self, _: None) -> None:
        self.stack.append(self.pop_to_mark())

    def do_dict(self, _: None) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self.set_items(values)

    def do_frozenset(self, _: None) -> None:
        self.stack.append(make_set(self.pop_to_mark()))

    def do_append(self, _: None) -> None:
        self.extend([self.pop()])

    def do_appends(self, _: None) -> None:
        self.extend(self.pop_to_mark())

    def do_setitem(self, _: None) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def do_setitems(self, _: None) -> None:
        self.set_items(self.pop_to_mark())

    def do_additems(self, _: None) -> None:
        members = self.pop_to_mark()
        self.expect_top(set).update(make_set(members))

    def do_pop(self, _: None) -> None:
        self.stack.pop()

    def do_pop_mark(self, _: None) -> None:
        self.pop_to_mark()

    def do_dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def extend(self, values: list) -> None:
        self.expect_top(list).extend(values)

    def set_items(self, values: list) -> None:
        target = self.expect_top(dict)
        if len(values) % 2:
            raise IndexError("a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[check_key(key)] = value

    def expect_top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"it fills {_describe(self.stack[-1])} as if it were a {kind.__name__}")
        return self.stack[-1]

    # Names, and what is made of them

    def do_global(self, argument: str) -> None:
        module, name = argument.split(" ", 1)
        self.push_name(module, name)

    def do_stack_global(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("it names a class by what is no string")
        self.push_name(module, name)

    def push_name(self, module: str, name: str) -> None:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in self.makers and full not in self.classes:
            raise ValueError(
                f"it names {full!r}, which no checkpoint of this family needs, and which could run anything"
            )
        self.stack.append(Name(full))

    def do_reduce(self, _: None) -> None:
        arguments, what = self.pop(), self.pop()
        if type(what) is not Name or type(arguments) is not tuple:
            raise ValueError(f"it calls {_describe(what)}")
        self.num_copied += sum(len(part) for part in arguments if type(part) in (str, bytes, list, tuple, set, dict))
        if self.num_copied > MAX_COPIED:
            raise ValueError(f"it copies more than {MAX_COPIED} elements")
        maker = self.makers.get(what.name)
        self.stack.append(maker(*arguments) if maker is not None else Shell(what.name, arguments))

    def do_newobj(self, _: None) -> None:
        arguments, what = self.pop(), self.pop()
        if type(what) is not Name or what.name not in self.classes or type(arguments) is not tuple:
            raise ValueError(f"it makes an object of {_describe(what)}")
        self.stack.append(Shell(what.name, arguments))

    def do_build(self, _: None) -> None:
        state, target = self.pop(), self.stack[-1]
        if type(target) is dict:
            return  # attributes of an OrderedDict, as a state dict's `_metadata`
        if type(target) is not Shell or target.state is not None:
            raise ValueError(f"it fills {_describe(target)} with a state")
        target.state = state

    def do_binpersid(self, _: None) -> None:
        self.stack.append(self.load_persistent(self.pop()))


def check_key(key: Any) -> Any:
    """A key of a dict or a member of a set; refused unless it is a plain value, a name, or a tuple of such."""
    plain = (str, int, float, bool, bytes, type(None), Name)
    parts = key if type(key) is tuple else (key,)
    if not all(type(part) in plain for part in parts):
        raise ValueError(f"it uses {_describe(key)} as a key")
    return key


def make_set(members: Any = ()) -> set:
    """A set of plain values."""
    if type(members) not in (list, tuple, set):
        raise ValueError(f"it makes a set of {_describe(members)}")
    return {check_key(member) for member in members}


def _describe(value: Any) -> str:
    if type(value) in (Name, Shell):
        return repr(value.name)
    return f"a {type(value).__name__}"
