"""Build `tokenizers` objects from the vocabularies of sentencepiece models and GGUF files."""

import math
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lwm.core.errors import CheckpointError
from lwm.core.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece, Vocabulary

# Splitting rules of byte-level vocabularies differ in the number of digits that stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_REMEDY = "add --tokenizer with the model's tokenizer.json"
_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")


def build(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """Build a tokenizer in which the id of each piece is its place in the vocabulary."""
    try:
        byte_level = vocabulary.method == "byte_level"
        backend = _byte_level(vocabulary) if byte_level else _sentencepiece(vocabulary)
        _add_specials(backend, vocabulary)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"the tokenizer's vocabulary and rules do not fit together ({error}); {_REMEDY}"
        ) from error
    return backend


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that form a piece, best score first, as BPE's merge rules."""
    ids = {piece.text: i for i, piece in enumerate(pieces) if piece.kind in (NORMAL, USER_DEFINED)}
    merges = [
        (-piece.score, ids[left], ids[right], left, right)
        for piece in pieces
        if piece.kind == NORMAL
        for cut in range(1, len(piece.text))
        if (left := piece.text[:cut]) in ids and (right := piece.text[cut:]) in ids
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _sentencepiece(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    pieces = vocabulary.pieces
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN), None)
    has_bytes = any(piece.kind == BYTE for piece in pieces)
    if vocabulary.method == "unigram":
        scores = [(piece.text, piece.score) for piece in pieces]
        if wrong := [piece.text for piece in pieces if not math.isfinite(piece.score)]:
            raise CheckpointError(
                f"the piece {wrong[0]!r} has a score that is not finite; replace the file"
            )
        model = models.Unigram(scores, unknown, has_bytes)
    else:
        model = models.BPE(
            {piece.text: i for i, piece in enumerate(pieces)},
            _merges(pieces),
            unk_token=None if unknown is None else pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    backend = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = []
    if vocabulary.character_map:
        steps.append(normalizers.Precompiled(vocabulary.character_map))
    if vocabulary.collapse_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if vocabulary.space_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.space_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)  # type: ignore[assignment]
    return backend


def _splitting(name: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("default", "gpt-2"):
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in _LLAMA_3 or name == "qwen2":
        words = Regex(_WORDS % ("{1,3}" if name in _LLAMA_3 else ""))
        unsplit = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), unsplit])
    raise CheckpointError(
        f"the file's tokenizer splits text by rules called {name!r}, which are unknown; {_REMEDY}"
    )


def _byte_level(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    rules = (rule.partition(" ") for rule in vocabulary.merges)
    pairs = [(left, right) for left, _, right in rules]
    model = models.BPE(
        {piece.text: i for i, piece in enumerate(vocabulary.pieces)},
        pairs,
        ignore_merges=vocabulary.splitter in _LLAMA_3,  # whole words without merge rules
    )
    backend = tokenizers.Tokenizer(model)
    if vocabulary.space_prefix:
        backend.normalizer = normalizers.Prepend(" ")  # type: ignore[assignment]
    backend.pre_tokenizer = _splitting(vocabulary.splitter)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend


def _add_specials(backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    """Mark special tokens, and add the beginning-of-text token if the vocabulary adds it."""
    pieces = vocabulary.pieces
    special = [piece.text for piece in pieces if piece.kind in (UNKNOWN, CONTROL)]
    added = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    for name, token in (("beginning", vocabulary.bos), ("end", vocabulary.eos)):
        if token is not None and not 0 <= token < len(pieces):
            raise CheckpointError(
                f"the tokenizer's {name}-of-text token is {token}, outside its {len(pieces)} "
                "pieces; replace the file"
            )
    if vocabulary.add_bos and vocabulary.bos is not None:
        prepend_bos(backend, pieces[vocabulary.bos].text, vocabulary.bos)


def prepend_bos(backend: tokenizers.Tokenizer, bos: str, token: int) -> None:
    """Let a tokenizer put the beginning-of-text token before each text."""
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, token)],
    )


def read_sentencepiece(path: Path) -> Vocabulary:
    """Read the vocabulary of a `tokenizer.model` of kind BPE or unigram."""
    # Imported here: few checkpoints need them, and protobuf would slow every start.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a sentencepiece model ({error}); replace it"
        ) from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    complete = proto.HasField("trainer_spec") and proto.pieces  # it follows the pieces
    if not complete or trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
        raise CheckpointError(
            f"{path} is not a sentencepiece model of kind BPE or unigram, or is cut short; use "
            "the model's tokenizer.json"
        )
    pieces = tuple(Piece(p.piece, p.score, p.type) for p in proto.pieces)
    return Vocabulary(
        method="unigram" if trainer.model_type == trainer.UNIGRAM else "pieces",
        pieces=pieces,
        space_prefix=normalizer.add_dummy_prefix,
        collapse_spaces=normalizer.remove_extra_whitespaces,
        character_map=normalizer.precompiled_charsmap,
        bos=trainer.bos_id if 0 <= trainer.bos_id < len(pieces) else None,
        eos=trainer.eos_id if 0 <= trainer.eos_id < len(pieces) else None,
    )
