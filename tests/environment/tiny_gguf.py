"""Writes a tiny Llama with random weights and a tokenizer as a GGUF file, 0.6 MB. Needs no network.

Run by the Python of the llama.cpp environment, which has numpy and gguf: `tiny_gguf.py FILE`.
"""

import sys
from itertools import product
from pathlib import Path
from typing import Any

WIDTH, LAYERS, HEADS, KEY_VALUE_HEADS, FEED_FORWARD, POSITIONS = 64, 2, 4, 2, 128, 2048
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def vocabulary() -> tuple[list[str], list[float], list[Any]]:
    """Tokens, scores and types of a SentencePiece tokenizer that can encode any text: bytes, letters, syllables."""
    from gguf import TokenType

    control = ["<unk>", "<s>", "</s>"]
    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    syllables = [f"{start}{middle}" for start, middle in product(["▁", *"bdklmnrst"], "aeiou")]
    pieces = letters + syllables
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * len(single_bytes) + [TokenType.NORMAL] * len(pieces)
    scores = [0.0] * (len(control) + len(single_bytes)) + [-float(rank) for rank in range(len(pieces), 0, -1)]
    return control + single_bytes + pieces, scores, types


def write(path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    tokens, scores, types = vocabulary()
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.normal(0, 0.3, shape).astype(np.float32))

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, dtype=np.float32))

    key_value_width = WIDTH // HEADS * KEY_VALUE_HEADS
    add("token_embd.weight", len(tokens), WIDTH)
    # A random model's answer: letters and syllables, no bytes of unfinished characters and no early end.
    output = random.normal(0, 0.3, (len(tokens), WIDTH)).astype(np.float32)
    output[: tokens.index("<0xFF>") + 1] = 0
    writer.add_tensor("output.weight", output)
    add_norm("output_norm.weight")
    for layer in range(LAYERS):
        add_norm(f"blk.{layer}.attn_norm.weight")
        add_norm(f"blk.{layer}.ffn_norm.weight")
        add(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.attn_k.weight", key_value_width, WIDTH)
        add(f"blk.{layer}.attn_v.weight", key_value_width, WIDTH)
        add(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", FEED_FORWARD, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", FEED_FORWARD, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
