"""Open GGUF files of Llama models: the configuration, the tokenizer's vocabulary, the tensors.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md). Rotary pairs are interleaved, as in
our layout.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lwm.checkpoints.checkpoint import Checkpoint
from lwm.checkpoints.formats.gguf_tensors import GgufReader, GgufTensors
from lwm.checkpoints.names import AS_IS, TRANSPOSED, NameRow, NameTable
from lwm.core.errors import CheckpointError
from lwm.core.vocabulary import CONTROL, NORMAL, Piece, Vocabulary
from lwm.models.llama import LlamaConfig

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
            raise CheckpointError(
                f"{self._source}: {key!r} in the header is broken ({error}); replace the file"
            ) from error
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{self._source}: {key!r} in the header is a {type(value).__name__}; replace the "
                "file"
            )
        return value


def is_gguf(path: Path) -> bool:
    """Return whether a path is a `.gguf` file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def open_gguf(file: Path) -> Checkpoint:
    """Open a GGUF file whose architecture is `llama`; refuse others."""
    source = str(file)
    try:
        with np.errstate(over="raise"):
            reader = GgufReader(file)
    except (ValueError, LookupError, ArithmeticError, RecursionError, OSError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise CheckpointError(
            f"{file} is not a GGUF file, or is broken or cut short ({reason}); copy or download "
            "it again"
        ) from error
    metadata = _Metadata(reader, source)
    architecture = metadata.get("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(
            f"{file} has the architecture {architecture!r}; only 'llama' is supported"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    stored = GgufTensors(tensors, reader.mapped, source)
    return Checkpoint(
        source=source,
        format="GGUF",
        stored_dtype=stored.dtype(),
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
            f"{source} scales its rotary embedding ({scaling}), which is not supported; only a "
            "plain frequency base is"
        )
    heads = metadata.get("llama.attention.head_count", int)
    hidden = metadata.get("llama.embedding_length", int)
    if heads < 1 or hidden < 1:
        raise CheckpointError(
            f"{source} has {heads} heads and a hidden size of {hidden}, which must be at least 1; "
            "replace the file"
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
