"""Save a random Llama in Hugging Face format, for tests of commands and evaluations."""

import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 128
"""Longest sequence of the model."""


def save_random_llama(directory: Path) -> None:
    """Save a model of one layer with four heads, and a byte-level tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = byte_level  # type: ignore[assignment]
    backend.decoder = ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the question and the answer, once upon a time"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288,  # more than the tokenizer has, as in padded vocabularies
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
