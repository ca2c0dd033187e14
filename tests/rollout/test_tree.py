"""Packed rows: every number and gradient is that of plain rows, and the controls that must fail do."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)
from trl.trainer.utils import add_fused_lm_head

from rltoken.rollout import packs, tree

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # large enough for a wrong position to show
}
FAMILIES = {
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "llama": lambda: LlamaConfig(**SIZES),
    "smollm2": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, rope_theta=100000),
}
EXPERTS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=16, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None),
}
PROMPT, COMPLETION = 6, 24


def model_of(kind, dtype=torch.float32, *, lora=False, checkpointing=False):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((FAMILIES | EXPERTS)[kind](), attn_implementation="sdpa", dtype=dtype)
    add_fused_lm_head(model, 0.8, outputs=("log_probs", "entropy"))
    tree.use(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).to(dtype)
    return model.train()


def tokens(generator, n):
    return torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()


def batch(families):
    """[B, P + T] ids and mask and [B] family of (prompt, completion) rows by family, trunks first as in a window."""
    rows = [(0, rows[0], number) for number, rows in enumerate(families)]
    rows += [(1, row, number) for number, rows in enumerate(families) for row in rows[1:]]
    ids = torch.zeros(len(rows), PROMPT + COMPLETION, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (_, (prompt, completion), _) in enumerate(rows):
        for start, part in ((PROMPT - len(prompt), prompt), (PROMPT, completion)):
            ids[i, start : start + len(part)] = torch.tensor(part)
            mask[i, start : start + len(part)] = 1
    return ids, mask, torch.tensor([number for _, _, number in rows])


def sampled(cuts, *, thinking=(14, 3, 17), seed=0, answers=2):
    """Families whose branches leave the trunk after each of `cuts` tokens, with answers of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    families = []
    for number, length in enumerate(thinking):
        prompt, trunk = tokens(generator, 2 + 2 * (number % 3)), tokens(generator, length)
        branches = [
            (prompt, trunk[:cut] + tokens(generator, 1 + (cut + answer + number) % 5))
            for cut in cuts
            for answer in range(answers)
        ]
        families.append([(prompt, trunk), *branches])
    return families


def scores(model, ids, mask):
    """(log-probs, entropies), each [B, T], of plain rows."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    found = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return found.log_probs[:, -COMPLETION:], found.entropy[:, -COMPLETION:]


def packed_scores(model, packed, mask):
    """The same of packed rows."""
    found = model(**packed.inputs, shift_labels=packed.labels, fused_lm_head=True)
    padding = mask[:, -COMPLETION:] == 0
    return tuple(packed.rows_of(value).masked_fill(padding, 0.0) for value in (found.log_probs, found.entropy))


def gradients(model, values, weights):
    """The gradient of every trained weight of a weighted sum of log-probs and entropies."""
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = sum((value * weight).sum() for value, weight in zip(values, weights, strict=True))
    return torch.autograd.grad(loss, trained)


def assert_packed_equals_rows(model, families, *, dtype=torch.float32, tolerance=5e-6, flex=False):
    ids, mask, family = batch(families)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(len(ids), COMPLETION, generator=generator) * mask[:, -COMPLETION:] for _ in range(2)]
    wanted = scores(model, ids, mask)
    of_rows = gradients(model, wanted, weights)
    packed = tree.plant(ids, mask, COMPLETION, family, dtype, flex=flex)
    found = packed_scores(model, packed, mask)
    of_tree = gradients(model, found, weights)
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=tolerance)
    scale = max(gradient.abs().max() for gradient in of_rows)
    assert scale > 0.1
    for value, other in zip(of_tree, of_rows, strict=True):
        assert ((value - other).abs().max() / scale) < tolerance


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_log_probs_entropies_and_gradients_are_those_of_rows(kind, lora, checkpointing):
    assert_packed_equals_rows(model_of(kind, lora=lora, checkpointing=checkpointing), sampled([2, 5, 9]))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_that_of_rows(flex_on_cpu, kind, checkpointing):
    model = model_of(kind, lora=True, checkpointing=checkpointing)
    assert_packed_equals_rows(model, sampled([0, 2, 5, 9]), flex=True)
    assert_packed_equals_rows(model, sampled([2, 5], thinking=(9,)), flex=True)


def test_no_line_of_flex_attention_is_empty(flex_on_cpu):
    """Padding sees a token too: a softmax over nothing may be NaN."""
    ids, mask, family = batch(sampled([2, 5]))
    packed = tree.plant(ids, mask, COMPLETION, family, torch.float32, flex=True)
    rows, columns = packed.ids.shape
    places = torch.meshgrid(torch.arange(rows), torch.arange(columns), torch.arange(columns), indexing="ij")
    seen = packed.blocks.mask_mod(places[0], torch.tensor(0), *places[1:])
    assert (packed.labels == -100).any() and seen.any(2).all()
    assert not (seen & (places[2] > places[1])).any()


@pytest.mark.parametrize("kind", FAMILIES)
def test_hidden_states_in_double_precision(kind):
    """What goes into TRL's head, which is single precision, as the layers' norms are."""
    model = model_of(kind, torch.float64).eval()
    ids, mask, family = batch(sampled([1, 4, 11]))
    wanted = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, PROMPT - 1 : -1]
    packed = tree.plant(ids, mask, COMPLETION, family, torch.float64)
    found = model.model(**packed.inputs)
    kept = mask[:, -COMPLETION:] > 0
    assert (packed.rows_of(found.last_hidden_state)[kept] - wanted[kept]).abs().max() < 1e-6


def test_masks_take_the_dtype_of_the_queries():
    """Which under autocast is not known before the forward."""
    model = model_of("qwen3").eval()
    ids, mask, family = batch(sampled([2, 5]))
    packed = tree.plant(ids, mask, COMPLETION, family, torch.bfloat16)
    assert {block.mask.dtype for block in packed.blocks} == {torch.bfloat16}
    for value, other in zip(packed_scores(model, packed, mask), scores(model, ids, mask), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=5e-6)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = scores(model, ids, mask)[0]
        packed = tree.plant(ids, mask, COMPLETION, family, torch.bfloat16)
        found = packed_scores(model, packed, mask)[0]
    assert 1e-6 < (found - wanted).abs().max() < 0.05


class DoubleNorm(torch.nn.Module):
    """The RMS norm of these models, which in transformers is single precision whatever comes in."""

    def __init__(self, stock):
        super().__init__()
        self.weight, self.epsilon = stock.weight, stock.variance_epsilon

    def forward(self, states):
        return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.epsilon)


def in_double(kind, **settings):
    """A model of which all that depends on its input is double precision."""
    model = model_of(kind, torch.float64, **settings)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, DoubleNorm(child))
    return model


def scores_of(states, head, ids):
    """(log-probs, entropies) in the precision of the hidden states behind each completion token, at temperature 0.8."""
    logps = (head(states) / 0.8).log_softmax(-1)
    chosen = logps.gather(2, ids[:, -COMPLETION:].unsqueeze(2)).squeeze(2)
    return chosen, -(logps.exp() * logps).sum(2)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_log_probs_entropies_and_gradients_in_double_precision(kind, lora, checkpointing):
    """TRL's fused head is single precision, so logits are made here; rotations are too, so rows have positions."""
    model = in_double(kind, lora=lora, checkpointing=checkpointing)
    causal = model.get_base_model() if lora else model
    ids, mask, family = batch(sampled([1, 4, 7, 11]))
    kept = (mask[:, -COMPLETION:] > 0).double()
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(kept.shape, generator=generator, dtype=torch.float64) * kept for _ in range(2)]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    states = causal.model(input_ids=ids, attention_mask=mask, position_ids=places).last_hidden_state[:, PROMPT - 1 : -1]
    packed = tree.plant(ids, mask, COMPLETION, family, torch.float64)
    of_tree = packed.rows_of(causal.model(**packed.inputs).last_hidden_state)
    wanted, found = (scores_of(values, causal.lm_head, ids) for values in (states, of_tree))
    for value, other in zip(found, wanted, strict=True):
        assert ((value - other) * kept).abs().max() < 1e-13
    pairs = zip(gradients(model, found, weights), gradients(model, wanted, weights), strict=True)
    assert max((value - other).abs().max() for value, other in pairs) < 1e-11


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts(kind):
    """Their router sees each token alone; its own loss is refused with rows stages."""
    assert tree.obstacle(model_of(kind)) is None
    assert_packed_equals_rows(model_of(kind), sampled([2, 5, 9]))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    "families",
    [
        sampled([3], thinking=(9,)),
        sampled([2, 4, 6, 8]),
        sampled([6, 12, 18], thinking=(24, 24, 20)),  # thinking at the limit
        sampled([5, 5, 5, 2], answers=3),  # thinking that ended before several budgets: their answers follow one prefix
        sampled([1], thinking=(1,)),  # nothing but the end of thinking
        [[([5], [7, 8, 9]), ([5], [7, 4])]],  # a prompt of one token, and padding
        sampled([14, 17], thinking=(14, 17)),  # branches after the last thinking token
        sampled([0], thinking=(1, 5)),  # nothing shared but the prompt
        [[([5, 6], [7]), ([5, 6], [7]), ([5, 6], [8])]],  # a branch that is its trunk, and one without thinking
        [[([5, 6], [7, 8, 9]), ([6], [9]), ([5, 6], [7])]],  # another prompt, as a filler has; a branch that ends early
        [[([5, 6], [7, 8, 9])], [([4], [3]), ([4], [2, 2])]],  # a family of one
        [[([5, 6], [7, 8, 9])]],  # no branch at all
    ],
    ids=[
        *("one cut", "four cuts", "limit", "pooled", "empty", "one token", "at the end", "no cut", "the trunk itself"),
        *("filler", "unequal", "trunks only"),
    ],
)
def test_odd_families(kind, families):
    assert_packed_equals_rows(model_of(kind), families)


def test_blocks_begin_where_most_branches_begin():
    assert tree._seams([], 4) == []
    assert tree._seams([0] * 6, 4) == [0, 6]
    assert tree._seams([1] * 9, 4) == [0, 4, 9]
    assert tree._seams([2, 0, 0, 1, 0, 2, 0, 0, 0, 0, 2, 0], 4) == [0, 5, 10, 12]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_blocks_of_any_size(monkeypatch, size):
    """A block may begin within a branch, and hold branches of different thinking in one column."""
    monkeypatch.setattr(tree, "LEAST_BLOCK", size)
    monkeypatch.setattr(tree, "BLOCKS_PER_TRUNK", 100)
    assert_packed_equals_rows(model_of("qwen2"), sampled([2, 5, 9], answers=3))


@given(
    thinking=st.lists(st.integers(1, 18), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 18), max_size=4),
    answers=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_any_families(thinking, cuts, answers, seed):
    families = sampled([min(cut, min(thinking)) for cut in cuts], thinking=thinking, seed=seed, answers=answers)
    assert_packed_equals_rows(model_of("smollm2"), families)


def test_each_shared_token_is_there_once():
    """Three branches that share 2, 5 and 5 of 14 thinking tokens: what is left of each, and one token more."""
    trunk = list(range(10, 24))
    answers = [[(40, 41), [*trunk[:2], 30, 31]], [(40, 41), [*trunk[:5], 32]], [(40, 41), [*trunk[:5], 33, 34]]]
    ids, mask, family = batch([[([40, 41], trunk), *(([*prompt], row) for prompt, row in answers)]])
    packed = tree.plant(ids, mask, COMPLETION, family, torch.float32)
    assert packed.ids.tolist() == [[40, 41, *trunk, 11, 30, 31, 14, 32, 14, 33, 34]]
    assert packed.positions.tolist() == [[*range(16), 3, 4, 5, 6, 7, 6, 7, 8]]
    (block,) = packed.blocks
    assert (block.start, block.end, block.first, block.reach) == (0, 8, 0, 6)
    assert block.mask.shape == (1, 1, 8, 6 + 8)
    assert (block.mask[0, 0] == 0).sum(1).tolist() == [4, 5, 6, 7, 8, 7, 8, 9]  # as many keys as its row has tokens
    assert tree.sizes(ids[:, PROMPT:], mask[:, PROMPT:], 4).tolist() == [[14, 8]]


def test_padding_is_not_shared():
    """Two rows of two tokens: the second has nothing of its own, but the repeated token."""
    ids = torch.tensor([[5, 6, 0, 0], [5, 6, 0, 0]])
    assert tree.sizes(ids, (ids > 0).long(), 2).tolist() == [[2, 1]]


def test_plain_rows_go_as_they_went():
    model = model_of("qwen3")
    ids, mask, _ = batch(sampled([2, 5]))
    packed_attention = scores(model, ids, mask)[0]
    model.set_attn_implementation("sdpa")
    assert torch.equal(scores(model, ids, mask)[0], packed_attention)


@pytest.mark.parametrize("broken", ["positions", "reach", "blocks"])
def test_the_comparison_sees_what_is_wrong(broken):
    """Positions that go on along the packed row, branches that see one token less, and plain causal attention."""
    model = model_of("llama").eval()
    ids, mask, family = batch(sampled([5, 9]))
    packed = tree.plant(ids, mask, COMPLETION, family, torch.float32)
    if broken == "positions":
        packed = dataclasses.replace(packed, positions=torch.arange(packed.ids.size(1)).expand_as(packed.ids))
    elif broken == "reach":
        (block,) = packed.blocks
        lost = (block.mask == 0) & ((block.mask == 0).long().cumsum(-1) == 4)
        cut = block.mask.masked_fill(lost, torch.finfo(torch.float32).min)
        packed = dataclasses.replace(packed, blocks=(dataclasses.replace(block, mask=cut),))
    else:
        inputs = packed.inputs | {"attention_mask": None, "tree_blocks": None}
        packed = SimpleNamespace(inputs=inputs, labels=packed.labels, rows_of=packed.rows_of)
    difference = (packed_scores(model, packed, mask)[0] - scores(model, ids, mask)[0]).abs().max()
    assert difference > 1e-2


def test_a_branch_sees_no_more_than_it_needs():
    """No [L, L] mask: 400 thinking tokens and three answers of 100 make a block each, and what these see."""
    generator = torch.Generator().manual_seed(0)
    trunk, prompt = tokens(generator, 400), tokens(generator, 6)
    ids, mask = torch.zeros(4, 406, dtype=torch.long), torch.zeros(4, 406, dtype=torch.long)
    for i, row in enumerate((trunk, *(trunk[:cut] + tokens(generator, 100) for cut in (100, 200, 300)))):
        ids[i, : 6 + len(row)], mask[i, : 6 + len(row)] = torch.tensor(prompt + row), 1
    packed = tree.plant(ids, mask, 400, torch.zeros(4, dtype=torch.long), torch.float32)
    assert [(block.start, block.end, block.first, block.reach) for block in packed.blocks] == [
        (0, 101, 0, 105),
        (101, 202, 101, 205),
        (202, 303, 202, 305),
    ]
    assert [tuple(block.mask.shape) for block in packed.blocks] == [
        (1, 1, 101, 105 + 101),
        (1, 1, 101, 205 + 101),
        (1, 1, 101, 305 + 101),
    ]


def untrained(config, attention="sdpa"):
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


CHUNKS = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**SIZES, sliding_window=8), "its layers see a sliding window"),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
            "layers of sliding_attention",
        ),
        (Gemma2Config(**SIZES, head_dim=8, sliding_window=8), "layers of sliding_attention"),
        (Llama4TextConfig(**SIZES, **CHUNKS), "layers of chunked_attention"),
        (StableLmConfig(**SIZES), "its attention function or its positions cannot be set"),
    ],
    ids=["mistral", "qwen2", "gemma2", "llama4", "stablelm"],
)
def test_models_that_cannot(config, reason):
    assert reason in tree.obstacle(untrained(config))


def test_a_window_that_is_switched_off_is_none():
    model = untrained(FAMILIES["qwen2"]())
    model.config.sliding_window, model.config.use_sliding_window = 8, False
    assert tree.obstacle(model) is None


@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "flex_attention"])
def test_another_attention_cannot(name):
    model = untrained(FAMILIES["llama"]())
    model.config._attn_implementation = name
    assert tree.obstacle(model) == f"its attention is {name}, and packed rows need sdpa"


def test_a_forward_without_positions_cannot():
    class Positionless(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    assert "its positions cannot be set" in tree.obstacle(Positionless(FAMILIES["llama"]()))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4), "not those of rows"),
        (NemotronConfig(**SIZES), "its forward does not take them"),
    ],
    ids=["positions that count padding", "blocks that are dropped"],
)
def test_what_no_setting_tells_is_tried(config, reason):
    model = untrained(config).train()
    assert tree.obstacle(model) is None and reason in tree.trial(model)
    assert not tree.used_by(model) and all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_that_is_not_causal_is_found_in_any_dtype(dtype):
    model = untrained(BertConfig(**SIZES | {"initializer_range": 0.5}))
    assert "not causal" in tree.trial(model.to(dtype))


@pytest.mark.parametrize("kind", [*FAMILIES, *EXPERTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_trial_leaves_no_trace(kind, dtype):
    """In any mode and dtype, and none of weights that are not here."""
    model = untrained((FAMILIES | EXPERTS)[kind]()).to(dtype).train()
    model.lm_head.eval()
    state = torch.get_rng_state()
    assert tree.trial(model) is None
    assert not model.lm_head.training and model.model.training and not tree.used_by(model)
    assert torch.equal(state, torch.get_rng_state())
    assert tree.trial(model.to("meta")) is None


def test_a_trial_is_without_dropout():
    model = untrained(LlamaConfig(**SIZES, attention_dropout=0.5)).train()
    state = torch.get_rng_state()
    assert tree.trial(model) is None
    assert torch.equal(state, torch.get_rng_state())


def test_what_flex_attention_would_change(flex_on_cpu):
    """Dropout, and a cap of attention's logits that sdpa leaves out; on a CPU it has no backward, there or later."""
    model = untrained(LlamaConfig(**SIZES, attention_dropout=0.1))
    assert tree.obstacle(model) is None and "has no backward on a CPU" in tree.obstacle(model, flex=True)
    elsewhere = {"flex": True, "device": torch.device("cuda")}
    assert "no dropout" in tree.obstacle(model, **elsewhere)
    model.config.attention_dropout = 0.0
    assert tree.obstacle(model, **elsewhere) is None
    model.config.attn_logit_softcapping = 30.0
    assert "cap its attention's logits" in tree.obstacle(model, **elsewhere) and tree.obstacle(model) is None
    assert "no backward on a CPU" in tree.obstacle(model.to("meta"), flex=True, device=torch.device("cpu"))


def test_saved_models_do_not_name_it(tmp_path):
    """Whoever loads the model later knows nothing of this module."""
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    assert tree.ATTENTION not in (tmp_path / "config.json").read_text()


def test_fold_keeps_families_together_and_unfold_undoes_it():
    """Two families of three rows: thinking rows first in a window, families in succession in a micro-batch."""
    ids = torch.tensor([[1], [2], [11], [12], [21], [22]])
    window = {"completion_ids": ids, "kind": list("tTabcd"), "row_scale": torch.tensor(3.0), "none": None}
    folded = packs.fold(window, 2)
    assert folded["completion_ids"].squeeze(2).tolist() == [[1, 11, 12], [2, 21, 22]]
    assert folded["kind"] == [["t", "a", "b"], ["T", "c", "d"]]
    rows, width = packs.unfold(folded)
    assert width == 3 and rows["completion_ids"].squeeze(1).tolist() == [1, 11, 12, 2, 21, 22]
    assert rows["kind"] == list("tabTcd") and rows["row_scale"] == 3.0 and rows["none"] is None
    assert packs.unfold(rows) == (rows, 1)
