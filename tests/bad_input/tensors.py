"""Safetensors files written by hand, so that they can be wrong: 8 bytes of header length, JSON, data."""

from __future__ import annotations

import json
from typing import Any

Header = dict[str, Any] | bytes


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def tensor_file(header: Header, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file; length: what it claims of its header, the truth by default."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = {"a": entry([2], [0, 8])}
TWO = json.dumps(GOOD["a"]).encode()
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"1234567", "truncated"),
    "no header": (bytes(8), "truncated"),
    "header of 2^64 - 1": (tensor_file({}, length=2**64 - 1), "header of 18,446,744,073,709,551,615 bytes"),
    "header of 2^63": (tensor_file({}, length=2**63), "more than the 26,214,400 taken"),
    "header of 100 MB": (tensor_file({}, length=100_000_000), "more than the"),
    "header longer than the file": (tensor_file({}, length=1000), "claims a header of 1,000 bytes but has 2"),
    "header cut": (tensor_file(GOOD, bytes(8), length=20), "no safetensors file"),
    "no JSON": (tensor_file(b"{]"), "no safetensors file"),
    "no UTF-8": (tensor_file(b'{"\xff": 1}'), "no safetensors file"),
    "a list": (tensor_file(b"[1, 2]"), "no safetensors file"),
    "null": (tensor_file(b"null"), "no safetensors file"),
    "a number": (tensor_file(b"12345678"), "no safetensors file"),
    "nested a hundred thousand deep": (tensor_file(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "objects nested deep": (tensor_file(b'{"a":' * 100_000), "nested too deeply"),
    "a key twice": (tensor_file(b'{"a": %b, "a": %b}' % (TWO, TWO), bytes(8)), "stands twice"),
    "NaN": (tensor_file(b'{"a": %b}' % TWO.replace(b"[2]", b"[NaN]"), bytes(8)), "no JSON number"),
    "overlapping": (tensor_file({**GOOD, "b": entry([2], [4, 12])}, bytes(12)), "invalid offset"),
    "the same bytes": (tensor_file({**GOOD, "b": entry([2], [0, 8])}, bytes(8)), "invalid offset"),
    "a hole": (tensor_file({**GOOD, "b": entry([2], [12, 20])}, bytes(20)), "invalid offset"),
    "offsets past the end": (tensor_file({"a": entry([4], [0, 16])}, bytes(8)), "no safetensors file"),
    "offsets backwards": (tensor_file({"a": entry([2], [8, 0])}, bytes(8)), "no safetensors file"),
    "negative offsets": (tensor_file({"a": entry([2], [-8, 0])}, bytes(8)), "no safetensors file"),
    "offsets of 2^63": (tensor_file({"a": entry([2], [2**63, 2**63 + 8])}, bytes(8)), "no safetensors file"),
    "one offset": (tensor_file({"a": entry([2], [0])}, bytes(8)), "no safetensors file"),
    "data left over": (tensor_file(GOOD, bytes(9)), "not fully covered"),
    "data missing": (tensor_file(GOOD, bytes(7)), "no safetensors file"),
    "size and shape differ": (tensor_file({"a": entry([3], [0, 8])}, bytes(8)), "no safetensors file"),
    "negative shape": (tensor_file({"a": entry([-2], [0, 8])}, bytes(8)), "no safetensors file"),
    "fractional shape": (tensor_file({"a": entry([2.5], [0, 8])}, bytes(8)), "no safetensors file"),
    "shape of 2^126": (tensor_file({"a": entry([2**63, 2**63], [0, 8])}, bytes(8)), "no safetensors file"),
    "shape of text": (tensor_file({"a": {**GOOD["a"], "shape": "2"}}, bytes(8)), "no safetensors file"),
    "unknown dtype": (tensor_file({"a": entry([2], [0, 8], "Q4_K")}, bytes(8)), "unknown variant"),
    "dtype of 3": (tensor_file({"a": {**GOOD["a"], "dtype": 3}}, bytes(8)), "no safetensors file"),
    "no dtype": (tensor_file({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "no safetensors file"),
    "metadata of numbers": (tensor_file({"__metadata__": {"a": 1}, **GOOD}, bytes(8)), "no safetensors file"),
    "a zip, as torch.save writes it": (b"PK\x03\x04" + bytes(200), "is a pickle of torch.save, which can run code"),
    "a pickle": (b"\x80\x04\x95" + bytes(200), "truncated or no safetensors file"),
    "GGUF": (b"GGUF\x03" + bytes(200), "is a GGUF file; these are read as .* ends in .gguf"),
    "a web page": (b"<!doctype html><html><body>404</body></html>", "is a web page in place of the file"),
    "a pointer of git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer .* `git lfs pull`"
    ),
}  # fmt: skip
