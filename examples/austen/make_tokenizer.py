#!/usr/bin/env python3
"""Trains the tokenizer of this folder: byte-level BPE of 2,048 tokens on austen.txt.

    python3 -m venv v && v/bin/pip install tokenizers==0.23.3 && v/bin/python make_tokenizer.py
"""
import json
import os

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
END = "<|endoftext|>"
VOCABULARY = 2048


def main():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = os.path.join(HERE, "austen.txt")
    tokenizer.train([text], trainer)
    tokenizer.save(os.path.join(HERE, "tokenizer.json"), pretty=False)
    with open(os.path.join(HERE, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": 2048,
                   "clean_up_tokenization_spaces": False}, f, indent=1)
        f.write("\n")
    with open(text, encoding="utf-8") as f:
        content = f.read()
    ids = tokenizer.encode(content).ids
    assert tokenizer.decode(ids) == content and tokenizer.get_vocab_size() == VOCABULARY
    print(f"{len(content)} characters, {len(ids)} tokens")


if __name__ == "__main__":
    main()
