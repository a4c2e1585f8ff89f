"""Pickles that run code, take memory or time where Python's own reader loads them; each would touch `marker`."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import subprocess
from pathlib import Path
from typing import Any

END = b"."
PLANTED = "meditron_planted_module"  # its import touches the marker


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, attribute: str) -> bytes:
    """By STACK_GLOBAL, which follows dots in the attribute."""
    return text(module) + text(attribute) + b"\x93"


def old_name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


class Reduced:
    """Pickles as what its `__reduce__` value says."""

    def __init__(self, *value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return self.value


def forbidden(marker: Path) -> dict[str, bytes]:
    """Payloads that name something; every one is to be refused by name."""
    command = f"touch {marker}"
    script = f"open({str(marker)!r}, 'w')"
    call = text(command) + b"\x85R" + END
    metadata_class = name("torch.distributed.checkpoint.metadata", "Metadata")
    dotted = name("megatron.core.dist_checkpointing.strategies.torch", "os.popen")
    nested = pickle.dumps(Reduced(os.system, (command,)))
    return {
        "os.system": pickle.dumps(Reduced(os.system, (command,)), protocol=2),
        "posix by protocol 4": pickle.dumps(Reduced(os.system, (command,)), protocol=4),
        "eval": pickle.dumps(Reduced(eval, (script,))),
        "exec as Python 2 spells it": old_name("__builtin__", "exec") + text(script) + b"\x85R" + END,
        "dots through a module of megatron-core": dotted + call,
        "dots through a module of torch": name("torch.distributed.checkpoint.filesystem", "os.system") + call,
        "dots through a listed name": name("collections", "OrderedDict.__init__") + b")R" + END,
        "dots in the module": old_name("torch.os", "system") + call,
        "a class made callable by its dict": dotted
        + b"N}"
        + text("__new__")
        + metadata_class
        + b"s\x86b"
        + call,
        "a class made callable by an attribute": metadata_class
        + b"N}"
        + text("__setstate__")
        + name("os", "system")
        + b"s\x86b"
        + text(command)
        + b"b"
        + END,
        "INST of protocol 0": b"(" + text(command) + b"ios\nsystem\n" + END,
        "OBJ": b"(" + old_name("os", "system") + text(command) + b"o" + END,
        "text arguments of protocol 0": old_name("os", "system") + b"(S'" + command.encode() + b"'\ntR" + END,
        "NEWOBJ": old_name("subprocess", "Popen")
        + b"("
        + text("touch")
        + text(str(marker))
        + b"\x86\x85\x81"
        + END,
        "NEWOBJ_EX": old_name("subprocess", "Popen")
        + b"]("
        + text("touch")
        + text(str(marker))
        + b"e\x85}\x92"
        + END,
        "a module with side effects": name(PLANTED, "anything") + END,
        "getattr from a module": name("builtins", "getattr")
        + name("torch", "os")
        + text("system")
        + b"\x86R"
        + call,
        "globals of a constructor": name("operator", "attrgetter")
        + text("__init__.__globals__")
        + b"\x85R"
        + END,
        "a partial": pickle.dumps(Reduced(collections.defaultdict, (os.system,))),
        "a pickle in a pickle": name("_pickle", "loads")
        + b"C"
        + bytes([len(nested)])
        + nested
        + b"\x85R"
        + END,
        "torch.load": name("torch.serialization", "load") + text(str(marker)) + b"\x85R" + END,
        "numpy.load": name("numpy", "load") + text(str(marker)) + b"\x85R" + END,
        "locate": name("pydoc", "locate") + text("os.system") + b"\x85R" + call,
        "a tensor made by os.system": name("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + name("os", "system")
        + b"N"
        + text(command)
        + b"\x85NtR"
        + END,
        "os.system in a state dict": pickle.dumps({"weight": Reduced(os.system, (command,))}),
        "a setter of states": pickle.dumps(Reduced(dict, (), {"a": 1}, None, None, os.system)),
        "a storage": b"("
        + text("storage")
        + old_name("os", "system")
        + text("0")
        + text("cpu")
        + b"K\1tQ"
        + END,
        "popen of a shell": pickle.dumps(Reduced(subprocess.Popen, (command, -1, None, None, None, None))),
    }


def unfit() -> dict[str, bytes]:
    """Payloads whose names are all allowed, or that name nothing: to be refused as damage, at once and in little
    memory."""
    listed = name("collections", "OrderedDict")
    size = name("torch", "Size")
    twice = b"K\1K\1\x86" + b"".join(
        b"2\x86" for _ in range(60)
    )  # (x, x) of (x, x) of ...: a hash of 2^60 steps
    long = b"]q\0(" + b"N" * 400_000 + b"e0"
    long_tuple = b"(" + b"N" * 400_000 + b"tq\0" + b"0"
    colliding = [(i << 61) - i for i in range(1, 50_000)]  # the hash of each is 0
    return {
        "an extension": b"\x82\x01" + END,
        "what a call gave is called": listed + b")R)R" + END,
        "a dtype is called": old_name("torch", "float32") + b")R" + END,
        "getattr of a listed name is called": size + b")R" + text("x") + b"\x85R" + END,
        "attributes of a constructor": size + b"N}" + text("make") + listed + b"s\x86b" + END,
        "a memo of 2^30 entries, then one of them": b"Nr\xff\xff\xff\x3fj\xff\xff\xff\x3e" + END,
        "bytes of 2^62": b"\x8e" + struct.pack("<Q", 1 << 62) + b"x" + END,
        "a bytearray of 2^62": b"\x96" + struct.pack("<Q", 1 << 62) + b"x" + END,
        "an integer of 2 GB": b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"1" + END,
        "a key that needs ages": b"}" + twice + b"Ns" + END,
        "an OrderedDict that needs ages": listed + b"]" + twice + b"K\1\x86a\x85R" + END,
        "an OrderedDict of no pairs": listed + b"]K\1a\x85R" + END,
        "a torch.Size of text": size + text("x" * 1000) + b"\x85R" + END,
        "a list copied often": long + size + b"q\1" + b"h\1h\0\x85R" * 40_000 + END,
        "arguments copied often": long_tuple
        + name("collections", "defaultdict")
        + b"q\1"
        + b"h\1h\0R" * 40_000
        + END,
        "long keys": long_tuple + b"}(" + b"h\0N" * 40_000 + b"u" + END,
        "keys that collide": b"}("
        + b"".join(b"\x8a\x0b" + number.to_bytes(11, "little") + b"N" for number in colliding)
        + b"u"
        + END,
        "a set that needs ages": b"\x8f(" + twice + b"\x90" + END,
        "nothing on the stack": END,
        "marks that do not match": b"t" + END,
        "no end": b"(" * 1000,
        "an out of band buffer": b"\x97" + END,
        "a key without a value": b"}(" + text("a") + b"u" + END,
    }


FORBIDDEN = list(forbidden(Path("marker")))
UNFIT = list(unfit())
