"""GGUF files of Llama models: weights tensor by tensor, dequantised or as the codes they are, and
the tokenizer's raw material.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md). Rotary pairs are interleaved there,
as they are here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization
from gguf.quants import Q4_K

from lwm.checkpoints.checkpoint import Checkpoint, forget_pages
from lwm.checkpoints.names import GGUF
from lwm.core.errors import CheckpointError
from lwm.core.vocabulary import CONTROL, NORMAL, Piece, Vocabulary
from lwm.models.llama import LlamaConfig
from lwm.models.quantized import BlockFormat, QuantizedTensor

SUPPORTED = {
    Quantization.F32, Quantization.F16, Quantization.BF16, Quantization.Q8_0, Quantization.Q4_0,
    Quantization.Q4_1, Quantization.Q4_K, Quantization.Q5_K, Quantization.Q6_K,
}  # fmt: skip

_FORMATS = {
    Quantization.Q8_0: BlockFormat(32, offsets=False),
    Quantization.Q4_0: BlockFormat(32, offsets=False),
    Quantization.Q4_1: BlockFormat(32, offsets=True),
    Quantization.Q4_K: BlockFormat(32, offsets=True),
    Quantization.Q5_K: BlockFormat(32, offsets=True),
    Quantization.Q6_K: BlockFormat(16, offsets=False),
}
"""Quantizations that an engine can compute with, at 8 bits or fewer."""

_NUMBERS_AT_A_TIME = 1 << 20


class _Reader(gguf.GGUFReader):
    """The package's reader, made safe and quick: it slices without asking whether the file is that
    long, and slices of a memory map are several times slower than those of a plain array over the
    same memory."""

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


class GgufTensors:
    """Tensors of one file."""

    def __init__(self, tensors: Mapping[str, gguf.ReaderTensor], mapped: Any, source: str) -> None:
        self._tensors, self._mapped, self._source = tensors, mapped, source
        for tensor in tensors.values():
            if tensor.tensor_type not in SUPPORTED:
                raise CheckpointError(
                    f"{source}: the tensor {tensor.name!r} is quantised as "
                    f"{tensor.tensor_type.name}, which is "
                    "not supported; use one of "
                    f"{', '.join(sorted(kind.name for kind in SUPPORTED))}"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        # ggml counts dimensions from the fastest.
        return {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def stored(self) -> str:
        """The type most tensors have."""
        kinds = [tensor.tensor_type.name for tensor in self._tensors.values()]
        return max(set(kinds), key=kinds.count)

    def read(self, name: str) -> np.ndarray:
        forget_pages(self._mapped)
        tensor = self._tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        out = np.empty(shape, np.float32)
        # Some rows at a time: the package joins its pieces into a second copy of what it is given.
        step = max(1, _NUMBERS_AT_A_TIME // max(1, out[:1].size))
        for first in range(0, len(out), step):
            rows = tensor.data[first : first + step]
            out[first : first + step] = gguf.dequantize(rows, tensor.tensor_type)
        return out

    def block_format(self, name: str) -> BlockFormat | None:
        """Return the block format of a matrix, or None where the file does not quantize it."""
        tensor = self._tensors[name]
        return _FORMATS.get(tensor.tensor_type) if len(tensor.shape) == 2 else None

    def quantized(self, name: str) -> QuantizedTensor:
        """Read a quantized matrix as the file stores it."""
        tensor, block_format = self._tensors[name], self.block_format(name)
        assert block_format is not None, name
        forget_pages(self._mapped)
        into, out = (int(n) for n in tensor.shape)
        per_block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        unpack = _small_blocks if per_block == 32 else _large_blocks
        values = np.empty((out, into), np.int8)
        shape = (out, into // block_format.block_size)
        factors = [np.empty(shape, "f4") for _ in range(1 + block_format.offsets)]
        step = max(1, _NUMBERS_AT_A_TIME // max(1, into))
        for first in range(0, out, step):
            rows = slice(first, first + step)
            blocks = np.ascontiguousarray(tensor.data[rows]).reshape(-1, size)
            for whole, part in zip(
                [values, *factors], unpack(blocks, tensor.tensor_type), strict=True
            ):
                whole[rows] = part.reshape(whole[rows].shape)
        return QuantizedTensor(values, factors[0], factors[1] if block_format.offsets else None)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., bytes] -> [..., 2, bytes]: the lower half of each byte, then the upper."""
    return np.stack([packed & 15, packed >> 4], axis=-2)


def _halves(blocks: np.ndarray, first: int, count: int) -> np.ndarray:
    """So many float16 of each block, as float32."""
    return np.ascontiguousarray(blocks[:, first : first + 2 * count]).view(np.float16).astype("f4")


def _small_blocks(blocks: np.ndarray, kind: Quantization) -> Sequence[np.ndarray]:
    """Unpack blocks of 32 numbers, one per row: values, scales and, in some formats, offsets."""
    factors = _halves(blocks, 0, 1 + _FORMATS[kind].offsets)
    packed = blocks[:, 2 * factors.shape[1] :]
    values = packed if kind == Quantization.Q8_0 else _nibbles(packed).reshape(-1, 32)
    values = values.view(np.int8)
    return values - np.int8(8) if kind == Quantization.Q4_0 else values, *factors.T


def _large_blocks(blocks: np.ndarray, kind: Quantization) -> Sequence[np.ndarray]:
    """Unpack blocks of 256 numbers: values split into 4 bits and 1 or 2, and quantized scales.

    Source: `block_q4_K` and its relatives in ggml.
    """
    count = len(blocks)
    if kind == Quantization.Q6_K:
        low, high, scales, _ = np.split(blocks, (128, 192, 208), axis=1)
        low = _nibbles(low.reshape(count, 2, 64)).reshape(count, 8, 32)
        high = high.reshape(count, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
        values = (low | high.reshape(count, 8, 32) << 4).view(np.int8) - np.int8(32)
        return values, _halves(blocks, 208, 1) * scales.view(np.int8)
    factors = _halves(blocks, 0, 2)
    scales, offsets = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    values = _nibbles(blocks[:, -128:].reshape(count, 4, 32)).reshape(count, 8, 32)
    if kind == Quantization.Q5_K:
        values |= (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    return values.view(np.int8), factors[:, :1] * scales, -(factors[:, 1:] * offsets)


class _Metadata:
    """Key-value pairs of the header, with types checked on the way out."""

    def __init__(self, reader: gguf.GGUFReader, source: str) -> None:
        self._fields, self._source = reader.fields, source

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        field = self._fields.get(key)
        if field is None:
            if default is ...:
                raise CheckpointError(
                    f"{self._source}: the header has no {key!r}; the file is incomplete or of "
                    "another kind"
                )
            return default
        try:
            value = field.contents()
        except (ValueError, LookupError) as error:  # text that is not UTF-8
            raise CheckpointError(
                f"{self._source}: {key!r} cannot be read from the header ({error}); replace the "
                "file"
            ) from error
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{self._source}: {key!r} is a {type(value).__name__} in the header; replace the "
                "file"
            )
        return value


def open_gguf(file: Path) -> Checkpoint:
    """A GGUF file whose architecture is `llama`.

    Raises:
        CheckpointError: the file is missing, broken, cut short, of another architecture, or
            quantised in an unknown way.
    """
    source = str(file)
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file; check the path")
    try:
        with np.errstate(over="raise"):
            reader = _Reader(file)
    except (ValueError, LookupError, ArithmeticError, RecursionError, OSError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise CheckpointError(
            f"{file} is not a GGUF file, is broken or cut short ({reason}); copy or download it "
            "again"
        ) from error
    metadata = _Metadata(reader, source)
    architecture = metadata.get("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(
            f"{file} is a GGUF file of the architecture {architecture!r}; only 'llama' can be read"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    stored = GgufTensors(tensors, reader.mapped, source)
    return Checkpoint(
        source=source,
        format="GGUF",
        stored=stored.stored(),
        config=_configuration(metadata, tensors, source),
        table=GGUF,
        tensors=stored,
        quantized=stored,
        vocabulary=_vocabulary(metadata, source),
    )


def _configuration(
    metadata: _Metadata, tensors: Mapping[str, gguf.ReaderTensor], source: str
) -> LlamaConfig:
    scaling = metadata.get("llama.rope.scaling.type", str, "none")
    linear = metadata.get("llama.rope.scale_linear", float, 1.0)
    if scaling != "none" or linear != 1.0 or "rope_freqs.weight" in tensors:
        raise CheckpointError(
            f"{source} scales its rotary embedding ({scaling}), which is not supported; only a "
            "plain "
            "frequency base is"
        )
    heads = metadata.get("llama.attention.head_count", int)
    hidden = metadata.get("llama.embedding_length", int)
    if heads < 1 or hidden < 1:
        raise CheckpointError(
            f"{source}: {heads} heads and {hidden} wide is no model; replace the file"
        )
    head_dim = metadata.get("llama.attention.key_length", int, hidden // heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if metadata.get(key, int, head_dim) != head_dim:
            raise CheckpointError(
                f"{source}: {key!r} is not the size of a head ({head_dim}), which is not supported"
            )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(
            f"{source}: the tensor 'token_embd.weight' is missing; replace the file"
        )
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
        # float32 in the file; seven digits give back the number that was meant
        rms_norm_eps=float(f"{metadata.get('llama.attention.layer_norm_rms_epsilon', float):.7g}"),
        tie_embeddings="output.weight" not in tensors,
    )


def _vocabulary(metadata: _Metadata, source: str) -> Vocabulary | None:
    method = metadata.get("tokenizer.ggml.model", str, None)
    if method not in ("llama", "gpt2"):
        return None
    texts = metadata.get("tokenizer.ggml.tokens", list)
    kinds = metadata.get("tokenizer.ggml.token_type", list, [NORMAL] * len(texts))
    scores = metadata.get("tokenizer.ggml.scores", list, [0.0] * len(texts))
    if not len(texts) == len(kinds) == len(scores):
        raise CheckpointError(
            f"{source}: the tokenizer has {len(texts)} tokens, {len(kinds)} types and "
            f"{len(scores)} scores; "
            "replace the file"
        )
    bos = metadata.get("tokenizer.ggml.bos_token_id", int, None)
    eos = metadata.get("tokenizer.ggml.eos_token_id", int, None)
    pieces = [Piece(*piece) for piece in zip(texts, scores, kinds, strict=True)]
    for token in (bos, eos):  # some files leave them unmarked
        if token is not None and 0 <= token < len(pieces):
            pieces[token] = pieces[token]._replace(kind=CONTROL)
    also_eos = [
        metadata.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eot", "eom")
    ]
    pieces_only = method == "llama"
    splitter = metadata.get("tokenizer.ggml.pre", str, "default")
    return Vocabulary(
        method="pieces" if pieces_only else "byte_level",
        pieces=tuple(pieces),
        merges=() if pieces_only else tuple(metadata.get("tokenizer.ggml.merges", list)),
        splitter=splitter,
        space_prefix=metadata.get("tokenizer.ggml.add_space_prefix", bool, pieces_only),
        add_bos=metadata.get(
            "tokenizer.ggml.add_bos_token", bool, pieces_only or splitter == "llama-bpe"
        ),
        bos=bos,
        eos=eos,
        also_eos=tuple(t for t in also_eos if t is not None and 0 <= t < len(pieces)),
        chat_template=metadata.get("tokenizer.chat_template", str, None),
    )
