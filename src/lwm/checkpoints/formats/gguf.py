"""Open GGUF files of Llama models and relatives: configuration, vocabulary and tensors.

The gguf package parses the file and dequantizes. It does not unpack values and scales without
dequantizing, so that is done here.

Sources: the GGUF specification (ggml-org/ggml, docs/gguf.md); ggml-common.h; for the scaling of
rotary embeddings, llama-model.cpp of ggml-org/llama.cpp.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization
from gguf.quants import Q4_K

from lwm.attention.rope import RopeScaling, rotary_frequencies
from lwm.checkpoints.checkpoint import Checkpoint, release_pages
from lwm.checkpoints.formats.rope_scaling import read_rope_scaling
from lwm.checkpoints.names import (
    AS_IS,
    HALF_SPLIT,
    TRANSPOSED,
    NameRow,
    NameTable,
    TensorLayout,
    kernel_rows,
)
from lwm.core.errors import CheckpointError
from lwm.core.vocabulary import CONTROL, NORMAL, Piece, Vocabulary
from lwm.models.llama import Kernel, LlamaConfig
from lwm.models.quantized import BlockFormat, QuantizedTensor

_MODULES: dict[Kernel, str] = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def _names(rotary: TensorLayout) -> NameTable:
    layouts: dict[Kernel, TensorLayout] = {"query": rotary, "key": rotary}
    kernels: dict[Kernel, tuple[str, TensorLayout]] = {
        kernel: (name, layouts.get(kernel, TRANSPOSED)) for kernel, name in _MODULES.items()
    }
    return (
        NameRow("embedding", "token_embd.weight", AS_IS),
        NameRow("layers.{layer}.attention_norm", "blk.{layer}.attn_norm.weight", AS_IS),
        NameRow("layers.{layer}.mlp_norm", "blk.{layer}.ffn_norm.weight", AS_IS),
        *kernel_rows(kernels, "blk.{layer}"),
        NameRow("norm", "output_norm.weight", AS_IS),
        NameRow("head", "output.weight", TRANSPOSED),
    )


ARCHITECTURES = {"llama": _names(TRANSPOSED), "qwen2": _names(HALF_SPLIT)}
"""The names and layouts of each architecture. Files of Mistral models call it llama, and Qwen2's
have Hugging Face's order of rotary pairs."""

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
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file} has the architecture {architecture!r}; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    table = ARCHITECTURES[architecture]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    stored = _GgufTensors(tensors, reader.mapped, source)
    return Checkpoint(
        source=source,
        format="GGUF",
        stored_dtype=stored.dtype,
        config=_read_config(metadata, architecture, tensors, source),
        table=table,
        tensors=stored,
        quantized=stored,
        vocabulary=_read_vocabulary(metadata, source),
        ignorable=lambda name: name == _FREQUENCIES,
    )


def _read_config(
    metadata: _Metadata, architecture: str, tensors: Mapping[str, gguf.ReaderTensor], source: str
) -> LlamaConfig:
    def get(key: str, kind: type, default: Any = ...) -> Any:
        return metadata.get(f"{architecture}.{key}", kind, default)

    heads, hidden = get("attention.head_count", int), get("embedding_length", int)
    if heads < 1 or hidden < 1:
        raise CheckpointError(
            f"{source} has {heads} heads and a hidden size of {hidden}; replace the file"
        )
    head_dim = get("attention.key_length", int, hidden // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        size = get(key, int, head_dim)
        if size != head_dim:
            raise CheckpointError(
                f"{source}: '{architecture}.{key}' is {size}; it must be {head_dim}, the size of "
                "a head"
            )
    context = get("context_length", int)
    window = get("attention.sliding_window", int, 0)
    if 0 < window < context:
        raise CheckpointError(
            f"{source} restricts attention to a sliding window of {window} tokens in a context of "
            f"{context:,}; only full attention is supported"
        )
    scaling = _read_scaling(get, tensors, context, source)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{source}: the tensor 'token_embd.weight' is missing")
    return LlamaConfig(
        vocab_size=int(embedding.shape[-1]),
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length", int),
        num_layers=get("block_count", int),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        max_sequence_length=context if scaling is None else scaling.context(context),
        rope_theta=get("rope.freq_base", float, 10000.0),
        rope_scaling=scaling,
        # The file stores float32; seven digits restore the decimal number.
        rms_norm_eps=float(f"{get('attention.layer_norm_rms_epsilon', float):.7g}"),
        biases=tuple(
            kernel for kernel, name in _MODULES.items() if f"blk.0.{name}.bias" in tensors
        ),
        tie_embeddings="output.weight" not in tensors,
    )


_FREQUENCIES = "rope_freqs.weight"
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _read_scaling(
    get: Callable[..., Any], tensors: Mapping[str, gguf.ReaderTensor], context: int, source: str
) -> RopeScaling | None:
    kind = get("rope.scaling.type", str, "linear")
    factor = get("rope.scaling.factor", float, 0.0) or get("rope.scale_linear", float, 1.0)
    stretched = kind != "none" and not (kind == "linear" and factor == 1)
    if _FREQUENCIES in tensors:
        if stretched:
            raise CheckpointError(
                f"{source} scales its rotary embedding by {kind!r} and by {_FREQUENCIES}; only "
                "one of them is supported"
            )
        return _factors(np.array(tensors[_FREQUENCIES].data, np.float32).ravel(), context, get)
    if not stretched:
        return None
    for key in ("yarn_log_multiplier", "yarn_ext_factor"):
        if get(f"rope.scaling.{key}", float, 0.0):
            raise CheckpointError(f"{source}: rope.scaling.{key} is not supported")
    keys: dict[str, Any] = {
        "rope_type": kind,
        "factor": factor,
        "max_position_embeddings": context,
        "original_max_position_embeddings": get("rope.scaling.original_context_length", int, 0),
        "beta_fast": get("rope.scaling.yarn_beta_fast", float, None),
        "beta_slow": get("rope.scaling.yarn_beta_slow", float, None),
    }
    names = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
    attention = math.prod(get(name, float, 1.0) for name in names)
    if kind == "yarn" and attention != 1 and factor > 0:  # on top of YaRN's own factor
        keys["attention_factor"] = attention * (1 + 0.1 * math.log(max(factor, 1)))
    return read_rope_scaling(keys, source)


def _factors(factors: np.ndarray, context: int, get: Callable[..., Any]) -> RopeScaling:
    """Return the scaling by a tensor of factors: Llama 3's if the factors are of its formula."""
    theta, head_dim = get("rope.freq_base", float, 10000.0), 2 * len(factors)
    if len(factors) and np.isfinite(factors).all() and factors.max() > 1:
        llama3 = RopeScaling(rope_type="llama3", factor=round(float(factors.max()), 3), **_LLAMA3)
        plain = rotary_frequencies(head_dim, theta)
        if np.allclose(plain / rotary_frequencies(head_dim, theta, llama3), factors, rtol=1e-5):
            return llama3
    return RopeScaling(
        rope_type="factors",
        factors=tuple(map(float, factors)),
        original_max_position_embeddings=context,
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
