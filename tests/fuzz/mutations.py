"""Damage files at random: bytes of any file, values of JSON, and what containers hold.

Behind a checksum or inside compressed data, random bytes would only reach the container's own
checks, so the contents are damaged and packed again.
"""

import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import zstandard

NUMBERS = (0, 1, 127, 128, 255, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**64 - 1)
VALUES = (
    None, True, 0, -1, 1.5, 10**30, 10**400, float("nan"), float("inf"), "", "x", "\ud800",
    "a" * 3000, [], {}, [[]], [None], {"": 0}, [[[[[[[[]]]]]]]], 2**31, -(2**63), "../x", "\x00",
    "{{ 1 / 0 }}",
)  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"

Mutation = Callable[[bytes, random.Random], bytes]


def mutated(data: bytes, choice: random.Random) -> bytes:
    """Return a damaged copy of a file."""
    if choice.random() < 0.6:
        for begins, mutation in _INSIDE.items():
            if data.startswith(begins):
                return mutation(data, choice)
        if data[8:9] == b"{":
            return _in_safetensors(data, choice)
        if data[:1] in (b"{", b"[") and not data.startswith((b"{%", b"{{")):
            return _in_json(data, choice)
    return damaged(data, choice)


def damaged(data: bytes, choice: random.Random) -> bytes:
    """Flip, cut, remove, repeat, move or replace parts of the bytes."""
    result = bytearray(data)
    for _ in range(choice.choice((1, 1, 1, 2, 5))):
        if not result:
            break
        # Headers decide more than the rest.
        end = len(result) if choice.random() < 0.5 else min(len(result), 400)
        at = choice.randrange(end)
        length = min(choice.choice((1, 2, 4, 8, 40, 1000)), len(result) - at)
        match choice.randrange(7):
            case 0:
                result[at] ^= 1 << choice.randrange(8)
            case 1:
                del result[at:]
            case 2:
                del result[at : at + length]
            case 3:
                result[at:at] = result[at : at + length] * choice.choice((1, 3))
            case 4:
                size = choice.choice((1, 2, 4, 8))
                number = choice.choice(NUMBERS) & ((1 << 8 * size) - 1)
                result[at : at + size] = number.to_bytes(size, choice.choice(("little", "big")))
            case 5:
                source = choice.randrange(len(result))
                result[at : at + length] = result[source : source + length]
            case _:
                result[at : at + length] = choice.randbytes(length)
    return bytes(result)


def changed(value: Any, choice: random.Random) -> Any:
    """Replace one value somewhere in JSON data, or remove it."""
    if isinstance(value, dict | list) and value and choice.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = choice.choice(keys)
        copy: Any = value.copy()
        if choice.random() < 0.1:
            del copy[key]
        else:
            copy[key] = changed(value[key], choice)
        return copy
    return choice.choice(VALUES)


def _in_json(data: bytes, choice: random.Random) -> bytes:
    try:
        return json.dumps(changed(json.loads(data), choice)).encode()
    except ValueError:  # a value on each line
        lines = data.splitlines()
        at = choice.randrange(len(lines))
        lines[at] = json.dumps(changed(json.loads(lines[at]), choice)).encode()
        return b"\n".join(lines) + b"\n"


def _in_safetensors(data: bytes, choice: random.Random) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if messages := header.get("__metadata__", {}).get("messages"):  # JSON in JSON
        header["__metadata__"]["messages"] = _in_json(messages.encode(), choice).decode()
    else:
        header = changed(header, choice)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def _in_zip(data: bytes, choice: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    name = choice.choice([*contents])
    contents[name] = damaged(contents[name], choice)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return target.getvalue()


def _in_gzip(data: bytes, choice: random.Random) -> bytes:
    return gzip.compress(mutated(gzip.decompress(data), choice))


def _in_zstandard(data: bytes, choice: random.Random) -> bytes:
    return zstandard.compress(mutated(zstandard.decompress(data), choice))


def _in_png(data: bytes, choice: random.Random) -> bytes:
    """Damage one chunk and compute its checksum again."""
    chunks, at = [], len(_PNG)
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append(data[at + 4 : at + 8 + length])
        at += 12 + length
    number = choice.randrange(len(chunks))
    chunks[number] = chunks[number][:4] + damaged(chunks[number][4:], choice)
    return _PNG + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


_INSIDE: dict[bytes, Mutation] = {
    b"PK\x03\x04": _in_zip,
    b"\x1f\x8b": _in_gzip,
    b"\x28\xb5\x2f\xfd": _in_zstandard,
    _PNG: _in_png,
}
