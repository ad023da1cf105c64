"""Writes a tiny Qwen3 with random weights: configuration, tokenizer, chat template, safetensors. Needs no network.

Run by the Python of the vLLM environment, which has torch and transformers: `tiny_model.py DIRECTORY`.
"""

import random
import sys
from pathlib import Path
from typing import Any

VOCABULARY = 1024
POSITIONS = 2048
BEGIN, END, TURN = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentences() -> list[str]:
    """Text to train the tokenizer on; the same on every run."""
    choice = random.Random(0).choice
    subjects = ["the cat", "a dog", "one bird", "our model", "the server", "my friend", "a small robot"]
    verbs = ["sees", "likes", "starts", "stops", "loads", "answers", "counts", "forgets"]
    objects = ["a tree", "the moon", "seven tokens", "an old request", "the last word", "two cores"]
    manners = ["quickly", "slowly", "at night", "in the morning", "again and again", "without a reason"]
    return [f"{choice(subjects).capitalize()} {choice(verbs)} {choice(objects)} {choice(manners)}." for _ in range(600)]


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer: it can encode any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(sentences(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, pad_token=BEGIN, model_max_length=POSITIONS
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Any) -> Any:
    """Two layers; 4 heads and 2 key-value heads, for two ranks; CPU attention needs a head size of 32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config).to(torch.bfloat16).eval()


def main() -> None:
    directory = Path(sys.argv[1])
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    make_model(tokenizer).save_pretrained(directory)


if __name__ == "__main__":
    main()
