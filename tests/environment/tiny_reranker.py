"""Writes a tiny BERT cross-encoder with random weights, 0.5 MB: it gives two texts a score. Needs no network.

Run by the Python of the infinity environment, which has torch and transformers: `tiny_reranker.py DIRECTORY`.
"""

import string
import sys
from pathlib import Path


def write(directory: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(0)
    directory.mkdir(parents=True)
    letters = [*string.ascii_lowercase, *string.digits]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (directory / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(str(directory / "vocab.txt"), model_max_length=128).save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.5,  # the default of 0.02 gives any two texts the same score
        num_labels=1,
    )
    BertForSequenceClassification(config).eval().save_pretrained(directory)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
