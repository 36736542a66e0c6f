"""Open GGUF files of Llama models: the configuration, the tokenizer's vocabulary, the tensors.

The gguf package parses the file and dequantizes. It does not unpack values and scales without
dequantizing, so that is done here. Rotary pairs are interleaved, as in our layout.

Sources: the GGUF specification (ggml-org/ggml, docs/gguf.md); ggml-common.h.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization
from gguf.quants import Q4_K

from lwm.checkpoints.checkpoint import Checkpoint, release_pages
from lwm.checkpoints.names import AS_IS, TRANSPOSED, NameRow, NameTable
from lwm.core.errors import CheckpointError
from lwm.core.vocabulary import CONTROL, NORMAL, Piece, Vocabulary
from lwm.models.llama import LlamaConfig
from lwm.models.quantized import BlockFormat, QuantizedTensor

GGUF_NAMES: NameTable = (
    NameRow("embedding", "token_embd.weight", AS_IS),
    NameRow("layers.{layer}.attention_norm", "blk.{layer}.attn_norm.weight", AS_IS),
    NameRow("layers.{layer}.query", "blk.{layer}.attn_q.weight", TRANSPOSED),
    NameRow("layers.{layer}.key", "blk.{layer}.attn_k.weight", TRANSPOSED),
    NameRow("layers.{layer}.value", "blk.{layer}.attn_v.weight", TRANSPOSED),
    NameRow("layers.{layer}.output", "blk.{layer}.attn_output.weight", TRANSPOSED),
    NameRow("layers.{layer}.mlp_norm", "blk.{layer}.ffn_norm.weight", AS_IS),
    NameRow("layers.{layer}.gate", "blk.{layer}.ffn_gate.weight", TRANSPOSED),
    NameRow("layers.{layer}.up", "blk.{layer}.ffn_up.weight", TRANSPOSED),
    NameRow("layers.{layer}.down", "blk.{layer}.ffn_down.weight", TRANSPOSED),
    NameRow("norm", "output_norm.weight", AS_IS),
    NameRow("head", "output.weight", TRANSPOSED),
)

_FORMATS = {
    Quantization.Q8_0: BlockFormat(32, offsets=False),
    Quantization.Q4_0: BlockFormat(32, offsets=False),
    Quantization.Q4_1: BlockFormat(32, offsets=True),
    Quantization.Q4_K: BlockFormat(32, offsets=True),
    Quantization.Q5_K: BlockFormat(32, offsets=True),
    Quantization.Q6_K: BlockFormat(16, offsets=False),
}
"""Quantizations that an engine can compute with, at 8 bits or fewer."""

_SUPPORTED = {Quantization.F32, Quantization.F16, Quantization.BF16, *_FORMATS}

_CHUNK = 1 << 20
"""Numbers that are unpacked together; bounds the temporary arrays."""


class _Metadata:
    def __init__(self, reader: gguf.GGUFReader, source: str) -> None:
        self._fields, self._source = reader.fields, source

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        field = self._fields.get(key)
        if field is None:
            if default is not ...:
                return default
            raise CheckpointError(f"{self._source}: the header has no {key!r}; replace the file")
        try:
            value = field.contents()
        except (ValueError, LookupError) as error:  # text that is not UTF-8
            message = f"{self._source}: {key!r} is broken ({error}); replace the file"
            raise CheckpointError(message) from error
        if not isinstance(value, kind):
            what = type(value).__name__
            raise CheckpointError(f"{self._source}: {key!r} is a {what}; replace the file")
        return value


def is_gguf(path: Path) -> bool:
    """Return whether a path is a `.gguf` file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def open_gguf(file: Path) -> Checkpoint:
    """Open a GGUF file whose architecture is `llama`; refuse others."""
    source = str(file)
    try:
        with np.errstate(over="raise"):
            reader = _Reader(file)
    except (ValueError, LookupError, ArithmeticError, RecursionError, OSError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise CheckpointError(
            f"{file} is not a GGUF file, or is broken or cut short ({reason}); download it again"
        ) from error
    metadata = _Metadata(reader, source)
    architecture = metadata.get("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(
            f"{file} has the architecture {architecture!r}; only 'llama' is supported"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    stored = _GgufTensors(tensors, reader.mapped, source)
    return Checkpoint(
        source=source,
        format="GGUF",
        stored_dtype=stored.dtype,
        config=_read_config(metadata, tensors, source),
        table=GGUF_NAMES,
        tensors=stored,
        quantized=stored,
        vocabulary=_read_vocabulary(metadata, source),
    )


def _read_config(
    metadata: _Metadata, tensors: Mapping[str, gguf.ReaderTensor], source: str
) -> LlamaConfig:
    scaling = metadata.get("llama.rope.scaling.type", str, "none")
    linear = metadata.get("llama.rope.scale_linear", float, 1.0)
    if scaling != "none" or linear != 1.0 or "rope_freqs.weight" in tensors:
        raise CheckpointError(
            f"{source} scales its rotary embedding ({scaling}); only a plain base is supported"
        )
    heads = metadata.get("llama.attention.head_count", int)
    hidden = metadata.get("llama.embedding_length", int)
    if heads < 1 or hidden < 1:
        raise CheckpointError(
            f"{source} has {heads} heads and a hidden size of {hidden}; replace the file"
        )
    head_dim = metadata.get("llama.attention.key_length", int, hidden // heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        size = metadata.get(key, int, head_dim)
        if size != head_dim:
            raise CheckpointError(
                f"{source}: {key!r} is {size}; it must be {head_dim}, the size of a head"
            )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{source}: the tensor 'token_embd.weight' is missing")
    return LlamaConfig(
        vocab_size=int(embedding.shape[-1]),
        hidden_size=hidden,
        intermediate_size=metadata.get("llama.feed_forward_length", int),
        num_layers=metadata.get("llama.block_count", int),
        num_heads=heads,
        num_kv_heads=metadata.get("llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        max_sequence_length=metadata.get("llama.context_length", int),
        rope_theta=metadata.get("llama.rope.freq_base", float, 10000.0),
        # The file stores float32; seven digits restore the decimal number.
        rms_norm_eps=float(f"{metadata.get('llama.attention.layer_norm_rms_epsilon', float):.7g}"),
        tie_embeddings="output.weight" not in tensors,
    )


def _read_vocabulary(metadata: _Metadata, source: str) -> Vocabulary | None:
    def get(name: str, kind: type, default: Any = ...) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", kind, default)

    method = get("model", str, None)
    if method not in ("llama", "gpt2"):
        return None
    texts = get("tokens", list)
    kinds = get("token_type", list, [NORMAL] * len(texts))
    scores = get("scores", list, [0.0] * len(texts))
    if not len(texts) == len(kinds) == len(scores):
        raise CheckpointError(
            f"{source}: the tokenizer has {len(texts)} tokens, {len(kinds)} types and "
            f"{len(scores)} scores; replace the file"
        )
    bos, eos = get("bos_token_id", int, None), get("eos_token_id", int, None)
    pieces = [Piece(*piece) for piece in zip(texts, scores, kinds, strict=True)]
    for token in (bos, eos):  # some files do not mark them as control tokens
        if token is not None and 0 <= token < len(pieces):
            pieces[token] = pieces[token]._replace(kind=CONTROL)
    also_eos = [get(f"{name}_token_id", int, None) for name in ("eot", "eom")]
    is_pieces = method == "llama"
    splitter = get("pre", str, "default")
    return Vocabulary(
        method="pieces" if is_pieces else "byte_level",
        pieces=tuple(pieces),
        merges=() if is_pieces else tuple(get("merges", list)),
        splitter=splitter,
        space_prefix=get("add_space_prefix", bool, is_pieces),
        add_bos=get("add_bos_token", bool, is_pieces or splitter == "llama-bpe"),
        bos=bos,
        eos=eos,
        also_eos=tuple(t for t in also_eos if t is not None and 0 <= t < len(pieces)),
        chat_template=metadata.get("tokenizer.chat_template", str, None),
    )


class _Reader(gguf.GGUFReader):
    """Parse the header with the gguf package, with bounds checks and less overhead.

    The package slices without comparing lengths with the file's, and slices of a memory map are
    several times slower than slices of a plain array over the same memory.
    """

    @property
    def data(self) -> np.ndarray:
        return self._plain

    @data.setter
    def data(self, value: np.ndarray) -> None:
        self.mapped = value
        self._plain = value.view(np.ndarray)

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self._plain):
            raise ValueError(f"{end:,} bytes are announced and the file has {len(self._plain):,}")
        return super()._get(offset, dtype, count, override_order)


class _GgufTensors:
    def __init__(self, tensors: Mapping[str, gguf.ReaderTensor], mapped: Any, source: str) -> None:
        self._tensors, self._mapped = tensors, mapped
        for tensor in tensors.values():
            if tensor.tensor_type not in _SUPPORTED:
                supported = ", ".join(sorted(kind.name for kind in _SUPPORTED))
                raise CheckpointError(
                    f"{source}: the tensor {tensor.name!r} is quantized as "
                    f"{tensor.tensor_type.name}; only {supported} are supported"
                )
        kinds = [tensor.tensor_type.name for tensor in tensors.values()]
        self.dtype = max(set(kinds), key=kinds.count, default="")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: _shape(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        release_pages(self._mapped)
        tensor = self._tensors[name]
        out = np.empty(_shape(tensor), np.float32)
        # In chunks, because the package concatenates its parts into a second copy.
        step = max(1, _CHUNK // max(1, out[:1].size))
        for first in range(0, len(out), step):
            rows = slice(first, first + step)
            out[rows] = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
        return out

    def block_format(self, name: str) -> BlockFormat | None:
        tensor = self._tensors[name]
        return _FORMATS.get(tensor.tensor_type) if len(tensor.shape) == 2 else None

    def quantized(self, name: str) -> QuantizedTensor:
        tensor, block_format = self._tensors[name], self.block_format(name)
        assert block_format is not None, name
        release_pages(self._mapped)
        out, into = _shape(tensor)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        unpack = _small_blocks if block_size == 32 else _large_blocks
        scales_shape = (out, into // block_format.block_size)
        arrays = [np.empty((out, into), np.int8)]
        arrays += [np.empty(scales_shape, "f4") for _ in range(1 + block_format.offsets)]
        step = max(1, _CHUNK // max(1, into))
        for first in range(0, out, step):
            rows = slice(first, first + step)
            blocks = np.ascontiguousarray(tensor.data[rows]).reshape(-1, block_bytes)
            for array, part in zip(arrays, unpack(blocks, tensor.tensor_type), strict=True):
                array[rows] = part.reshape(array[rows].shape)
        return QuantizedTensor(*arrays, *[None] * (3 - len(arrays)))  # type: ignore[arg-type]


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """Return the shape in numpy's order; ggml lists the fastest dimension first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def _nibbles(packed: np.ndarray) -> np.ndarray:
    # [..., bytes] -> [..., 2, bytes]: the lower half of each byte, then the upper.
    return np.stack([packed & 15, packed >> 4], axis=-2)


def _float16s(blocks: np.ndarray, first: int, count: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, first : first + 2 * count]).view(np.float16).astype("f4")


def _small_blocks(blocks: np.ndarray, kind: Quantization) -> Sequence[np.ndarray]:
    """Unpack blocks of 32 numbers, one per row, to values, scales and perhaps offsets."""
    factors = _float16s(blocks, 0, 1 + _FORMATS[kind].offsets)
    packed = blocks[:, 2 * factors.shape[1] :]
    values = packed if kind == Quantization.Q8_0 else _nibbles(packed).reshape(-1, 32)
    values = values.view(np.int8)
    return values - np.int8(8) if kind == Quantization.Q4_0 else values, *factors.T


def _large_blocks(blocks: np.ndarray, kind: Quantization) -> Sequence[np.ndarray]:
    """Unpack blocks of 256 numbers, whose values are split into 4 bits and 1 or 2 further bits,
    and whose scales are quantized themselves."""
    count = len(blocks)
    if kind == Quantization.Q6_K:
        low, high, scales, _ = np.split(blocks, (128, 192, 208), axis=1)
        low = _nibbles(low.reshape(count, 2, 64)).reshape(count, 8, 32)
        high = high.reshape(count, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
        values = (low | high.reshape(count, 8, 32) << 4).view(np.int8) - np.int8(32)
        return values, _float16s(blocks, 208, 1) * scales.view(np.int8)
    factors = _float16s(blocks, 0, 2)
    scales, offsets = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    values = _nibbles(blocks[:, -128:].reshape(count, 4, 32)).reshape(count, 8, 32)
    if kind == Quantization.Q5_K:
        values |= (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    return values.view(np.int8), factors[:, :1] * scales, -(factors[:, 1:] * offsets)
