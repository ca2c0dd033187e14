#!/usr/bin/env python3
"""GPU memory of training, computed: what docs/scaling.md quotes. Nothing is loaded, and no GPU is needed.

    python scripts/memory.py                          three sizes, 1, 8 and 64 GPUs, every strategy
    python scripts/memory.py --model 7B --gpus 8 --tokens 16384 --reference

All figures are bytes of one GPU, by these formulas, with P parameters, L layers, H hidden, I intermediate, V
vocabulary, N GPUs and T tokens of one forward and backward (rollout.pack_tokens, or rows x length), and bfloat16 (2
bytes) but where a 4 stands:

    states      ddp    4 (P weights + P gradients + 2 P of AdamW + P of DDP's buckets where N > 1)
                fsdp2  4 (P + P + 2 P) / N   accelerate holds float32, and computes in bfloat16
                zero2  2 P + 2 P / N + 4 (P + 2 P) / N
                zero3  2 (P + P) / N + 4 (P + 2 P) / N
                lora   2 P and 16 bytes for each parameter of the adapter; lora_fsdp2 that / N
                qlora  0.516 for each parameter of a layer, 2 for the others, and 16 for each of the adapter
    gathered    fsdp2  2 (two layers, the embedding, the head);  zero3: 2 GB, its default of 1e9 live parameters
    reference   2 P, in N parts under fsdp2 and zero3; none with trainer.beta=0 or an adapter
    activations 2 T H L of the layers' inputs (gradient checkpointing), 2 T (8 H + 4 I) of the layer that is computed
                anew, 4 T H of the hidden state's gradient
    head        TRL's fused head: a tile of 4096 tokens x 32768 entries, 2 bytes each, 4 V H of the weight's gradient
    cache       vLLM's: 4 L x kv heads x head size for each token of each sequence that is sampled at once

What is left out: the CUDA context and NCCL's buffers (about 1 to 2 GB), fragmentation (5 to 10 %), temporary copies.
"""

import argparse
from dataclasses import dataclass

GIB = 2**30
TILE = 4096 * 32768 * 2
LIVE_PARAMETERS = 10**9
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3", "lora", "lora_fsdp2", "qlora")
ALONE = ("ddp", "lora", "qlora")
"""What one GPU can do."""
SPLIT = ("fsdp2", "zero3", "lora_fsdp2")
"""What holds a part of the frozen weights only."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2: layers, hidden, intermediate, query and key-value heads of `head` numbers, vocabulary; head untied."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head: int = 128

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        query, key = self.heads * self.head, self.kv_heads * self.head
        attention = self.hidden * (query + 2 * key) + query + 2 * key + query * self.hidden
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer + 2 * self.vocabulary * self.hidden + self.hidden

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA adapter of all linear layers but the head."""
        query, key = self.heads * self.head, self.kv_heads * self.head
        sides = 2 * (self.hidden + query) + 2 * (self.hidden + key) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * sides

    @property
    def cache_per_token(self) -> int:
        """Bytes of keys and values of a token."""
        return 4 * self.layers * self.kv_heads * self.head


MODELS = {
    "1.5B": Shape(layers=28, hidden=1536, intermediate=8960, heads=12, kv_heads=2, vocabulary=151936),
    "7B": Shape(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, vocabulary=152064),
    "32B": Shape(layers=64, hidden=5120, intermediate=27648, heads=40, kv_heads=8, vocabulary=152064),
}
"""The shapes of DeepSeek-R1-Distill-Qwen."""


def states(shape: Shape, strategy: str, gpus: int, rank: int) -> float:
    """Bytes of weights, gradients and optimizer on one GPU."""
    p, ends, adapter = shape.parameters, 2 * shape.vocabulary * shape.hidden, 16 * shape.adapter(rank)
    return {
        "ddp": 20 * p if gpus > 1 else 16 * p,
        "fsdp2": 16 * p / gpus,
        "zero2": 2 * p + 14 * p / gpus,
        "zero3": 16 * p / gpus,
        "lora": 2 * p + adapter,
        "lora_fsdp2": (2 * p + adapter) / gpus,
        "qlora": 0.516 * (p - ends) + 2 * ends + adapter,
    }[strategy]


def gathered(shape: Shape, strategy: str) -> float:
    """Bytes of weights of other GPUs that a forward holds."""
    layers = 2 * (2 * shape.layer + 2 * shape.vocabulary * shape.hidden)
    return {"fsdp2": layers, "lora_fsdp2": layers, "zero3": 2 * LIVE_PARAMETERS}.get(strategy, 0)


def reference(shape: Shape, strategy: str, gpus: int) -> float:
    """Bytes of the frozen reference."""
    if "lora" in strategy:
        return 0
    return 2 * shape.parameters / (gpus if strategy in SPLIT else 1)


def activations(shape: Shape, tokens: int) -> float:
    """Bytes of a forward and backward of `tokens` with gradient checkpointing, without the head."""
    kept = 2 * tokens * shape.hidden * shape.layers
    anew = 2 * tokens * (8 * shape.hidden + 4 * shape.intermediate)
    return kept + anew + 4 * tokens * shape.hidden


def head(shape: Shape, strategy: str) -> float:
    """Bytes of TRL's fused head; an adapter has no gradient of its weight."""
    return TILE + (0 if "lora" in strategy else 4 * shape.vocabulary * shape.hidden)


def total(
    shape: Shape, strategy: str, gpus: int, tokens: int, *, rank: int = 32, with_reference: bool = False
) -> float:
    """Bytes of training on one GPU."""
    frozen = reference(shape, strategy, gpus) if with_reference else 0
    parts = states(shape, strategy, gpus, rank), gathered(shape, strategy), activations(shape, tokens)
    return sum(parts) + frozen + head(shape, strategy)


def main() -> None:
    """Print a line for each model, number of GPUs and strategy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--gpus", type=int, action="append")
    parser.add_argument("--tokens", type=int, default=9216, help="of one forward and backward")
    parser.add_argument("--length", type=int, default=9216, help="tokens of a sequence that vLLM samples")
    parser.add_argument("--rank", type=int, default=32, help="of a LoRA adapter")
    parser.add_argument("--reference", action="store_true", help="trainer.beta above 0")
    args = parser.parse_args()
    print(f"{'model':5} {'GPUs':>4} {'strategy':10} {'states':>7} {'gathered':>8} {'reference':>9} {'activ.':>6} "
          f"{'head':>5} {'sum':>6}   GiB of one GPU")  # fmt: skip
    for name in args.model or MODELS:
        shape = MODELS[name]
        for gpus in args.gpus or (1, 8, 64):
            for strategy in STRATEGIES if gpus > 1 else ALONE:
                frozen = reference(shape, strategy, gpus) if args.reference else 0
                parts = (
                    states(shape, strategy, gpus, args.rank), gathered(shape, strategy), frozen,
                    activations(shape, args.tokens), head(shape, strategy),
                )  # fmt: skip
                whole = total(shape, strategy, gpus, args.tokens, rank=args.rank, with_reference=args.reference)
                columns = zip((7, 8, 9, 6, 5, 6), (*parts, whole), strict=True)
                print(f"{name:5} {gpus:4} {strategy:10} " + " ".join(f"{n / GIB:{width}.1f}" for width, n in columns))
        cache = shape.cache_per_token * args.length / GIB
        print(f"{name:5}      vLLM       {2 * shape.parameters / GIB:.1f} of weights, {cache:.2f} of cache a sequence")


if __name__ == "__main__":
    main()
