"""The tiny model of the embedded world: a Qwen3 of 0.21 million parameters with a head size that vLLM serves.

Qwen3, not Qwen2: for the model type `qwen2`, `AutoTokenizer` ignores the tokenizer class that a folder names and builds
a byte-level Qwen2 tokenizer, which reads this world's words wrongly without a word of warning.
"""

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM


def model_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """The configuration for a tokenizer: three layers of four heads of size 32, tied.

    vLLM wants heads of 32 or more. With two of them instead of four, some seeds never get past chance.
    """
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Qwen3ForCausalLM:
    """A float32 model on the CPU with weights drawn from `seed`; the global generators are left as they were."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(model_config(tokenizer)).float()
