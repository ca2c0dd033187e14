"""The tiny Qwen2 of the embedded world: 0.16 million parameters with a head size that vLLM serves."""

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM


def model_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """The configuration for a tokenizer: three layers of two heads of size 32 (vLLM wants 32 or more), tied."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Qwen2ForCausalLM:
    """A float32 model on the CPU with weights drawn from `seed`; the global generators are left as they were."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(model_config(tokenizer)).float()
