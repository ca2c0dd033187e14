"""One forward for rows that begin alike: a packed row [trunk | branch | branch | ...] per family.

A family is a thinking row and the rows that were grown from it. Its trunk is the thinking row, prompt included; each
other row is a branch: what it has after its longest common beginning with the trunk, with the last shared token once
more in front, which predicts the first token of its own. A branch attends to the trunk before that token and to itself,
at the positions of its row. So each token that rows share is encoded once, and log-probabilities, entropies, hidden
states and gradients are those of the rows, to rounding.

Attention is split, so that no [L, L] mask is made and little is computed to be masked: the trunk is causal without a
mask, padded at the right; branch tokens attend block by block, each to the trunk as far as its branches need it and to
its own branches, by an additive mask of its own. The blocks travel as an argument that transformers hands down to the
attention function; one of this module takes them, and is sdpa's where there are none. FlexAttention, on a GPU, takes a
BlockMask of the whole packed row in their place, made of which columns each one sees, and no mask at all is stored.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rltoken.errors import first_line

ATTENTION = "rltoken_tree"
"""The name under which transformers finds the attention function of this module."""
LEAST_BLOCK, BLOCKS_PER_TRUNK = 128, 8
"""A block has about an eighth of the trunk's columns, or 128 if that is more: smaller ones copy more keys."""
TRIED = ((0, 3, 4, 5, 6, 7), (0, 3, 4, 5, 8, 0), (9, 3, 4, 5, 6, 0), (9, 3, 7, 5, 2, 8))
"""Rows of two families for `trial`, 0 on padding: prompts of 1 and 2 tokens, and a branch each."""


@dataclass(frozen=True)
class Block:
    """How branch columns [start, end) attend: to trunk columns [0, reach) and to branch columns [first, end).

    `mask` [R, 1, end - start, reach + end - first] is additive.
    """

    start: int
    end: int
    first: int
    reach: int
    mask: Tensor


@dataclass(frozen=True)
class Tree:
    """R packed rows of L = N + M tokens: N of the longest trunk, M of the most branch tokens of a family.

    `ids` and `positions` are [R, L]; `labels` [R, L] is the token that each place predicts, -100 where none is asked
    for; `blocks` cover the M branch columns, or a BlockMask all L; `places` [B, T] is where, in the flattened [R * L],
    the token is predicted that a row has in a completion column (0 on padding).
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    blocks: tuple[Block, ...] | BlockMask
    places: Tensor

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model's forward takes."""
        # transformers leaves a 4-D mask as it is, and makes none of its own; this one is not looked at.
        unused = self.ids.new_empty(len(self.ids), 1, 0, 0)
        return {
            "input_ids": self.ids,
            "attention_mask": unused,
            "position_ids": self.positions,
            "tree_blocks": self.blocks,
        }

    def rows_of(self, values: Tensor) -> Tensor:
        """[B, T, ...] what a forward gave, [R, L, ...], at the completion tokens of each row."""
        return values.flatten(0, 1)[self.places]


class Pieces:
    """Keys or values [R, heads, L, D], cut once wherever what some block sees begins or ends.

    The gradient of a slice is as large as what it was taken from, that of a cut as the piece.
    """

    def __init__(self, states: Tensor, trunk: int, blocks: tuple[Block, ...]) -> None:
        seams = {0, trunk, states.size(2)}.union(
            *({block.reach, trunk + block.first, trunk + block.end} for block in blocks)
        )
        self._seams, self._trunk = sorted(seams), trunk
        widths = [end - start for start, end in itertools.pairwise(self._seams)]
        self._pieces = dict(zip(self._seams, states.split(widths, 2), strict=False))

    def of_trunk(self) -> Tensor:
        """Those of the trunk."""
        return torch.cat(self._between(0, self._trunk), 2)

    def seen_by(self, block: Block) -> Tensor:
        """Those that a block attends to."""
        own = self._between(self._trunk + block.first, self._trunk + block.end)
        return torch.cat([*self._between(0, block.reach), *own], 2)

    def _between(self, start: int, end: int) -> list[Tensor]:
        return [self._pieces[seam] for seam in self._seams if start <= seam < end]


def plant(
    ids: Tensor,
    attention: Tensor,
    completion_columns: int,
    family: Tensor,
    dtype: torch.dtype,
    *,
    flex: bool = False,
) -> Tree:
    """Pack rows by family.

    Args:
        ids, attention: [B, P + T] token ids and mask, prompts padded at the left, completions at the right.
        completion_columns: T.
        family: [B] number of each row's family; its first row is the trunk.
        dtype: of the additive masks, that of the model's activations.
        flex: for FlexAttention, a BlockMask in the place of blocks with masks.
    """
    rows = torch.arange(len(ids), device=ids.device)
    columns = torch.arange(ids.size(1), device=ids.device)
    lengths, prompts = attention.sum(1), attention[:, :-completion_columns].sum(1)
    padded = ids.size(1) - completion_columns - prompts
    tokens = ids.gather(1, (padded.unsqueeze(1) + columns).clamp(max=ids.size(1) - 1))

    number, trunks, trunk_of = _trunks(family, rows)
    own = columns < lengths.unsqueeze(1)
    common = ((tokens == tokens[trunk_of]) & own & own[trunk_of]).long().cumprod(1).sum(1)
    is_trunk = trunk_of == rows
    fork = common.clamp(min=1) - 1
    sizes = torch.where(is_trunk, 0, lengths - fork)
    starts, most = _starts(sizes, number, len(trunks))

    trunk_columns = int(lengths[trunks].max())
    row = rows.repeat_interleave(sizes)
    step = torch.arange(len(row), device=ids.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    place = number[row], starts[row] + step
    branch = ids.new_zeros(len(trunks), most), ids.new_zeros(len(trunks), most), ids.new_zeros(len(trunks), most)
    owner = ids.new_full((len(trunks), most), -1).index_put(place, row)
    made, positions, reach = (
        base.index_put(place, value)
        for base, value in zip(branch, (tokens[row, fork[row] + step], fork[row] + step, fork[row]), strict=True)
    )
    packed = torch.cat([tokens[trunks, :trunk_columns], made], 1)

    before = prompts.unsqueeze(1) + columns[:completion_columns] - 1
    on_branch = ~is_trunk.unsqueeze(1) & (before >= fork.unsqueeze(1))
    column = torch.where(on_branch, trunk_columns + (starts - fork).unsqueeze(1) + before, before)
    kept = attention[:, -completion_columns:] > 0
    places = (number.unsqueeze(1) * packed.size(1) + column).masked_fill(~kept, 0)
    labels = torch.full_like(packed, -100).flatten()
    labels[places[kept]] = ids[:, -completion_columns:][kept]
    seen = owner, reach, trunk_columns
    return Tree(
        ids=packed,
        positions=torch.cat([columns[:trunk_columns].expand(len(trunks), -1), positions], 1),
        labels=labels.view_as(packed),
        blocks=_block_mask(*seen) if flex else _blocks(*seen, positions, dtype),
        places=places,
    )


def sizes(ids: Tensor, mask: Tensor, width: int) -> Tensor:
    """[F, 2] tokens of the trunk's completion and of all branches of each family, as `plant` packs them.

    Args:
        ids, mask: [F * width, T] completion ids and mask, families in succession, each with its trunk first.
        width: rows of a family, which have one prompt.
    """
    ids, own = ids.view(-1, width, ids.size(1)), mask.view(-1, width, mask.size(1)) > 0
    common = ((ids == ids[:, :1]) & own & own[:, :1]).long().cumprod(2).sum(2)
    lengths = own.sum(2)
    return torch.stack([lengths[:, 0], (lengths - common + 1)[:, 1:].sum(1)], 1)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree_blocks: tuple[Block, ...] | BlockMask | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of packed rows by their blocks; where there are none, of anything else, transformers' sdpa.

    `query` is [R, heads, L, D], `key` and `value` have their own number of heads; the result is [R, L, heads, D].
    """
    if tree_blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if isinstance(tree_blocks, BlockMask):
        return flex_attention_forward(module, query, key, value, tree_blocks, **settings)[0], None
    settings.pop("is_causal", None)
    trunk = query.size(2) - (tree_blocks[-1].end if tree_blocks else 0)
    queries = query.split([trunk, *(block.end - block.start for block in tree_blocks)], 2)
    keys, values = Pieces(key, trunk, tree_blocks), Pieces(value, trunk, tree_blocks)
    of_trunk, _ = sdpa_attention_forward(
        module, queries[0], keys.of_trunk(), values.of_trunk(), None, is_causal=True, **settings
    )
    of_blocks = [
        sdpa_attention_forward(
            module, own, keys.seen_by(block), values.seen_by(block), block.mask.to(query.dtype), **settings
        )[0]
        for own, block in zip(queries[1:], tree_blocks, strict=True)
    ]
    return torch.cat([of_trunk, *of_blocks], 1), None


def obstacle(model: PreTrainedModel, *, flex: bool = False, device: torch.device | None = None) -> str | None:
    """Why the model cannot encode packed rows, as far as its settings tell, or None where it can.

    Args:
        model: a causal language model.
        flex: whether FlexAttention is to encode them.
        device: where it will be; None: where it is.
    """
    config = model.config.get_text_config()
    if flex and (device or model.device).type == "cpu":
        return "FlexAttention has no backward on a CPU"
    if flex and getattr(config, "attention_dropout", 0.0):
        return "FlexAttention knows no dropout, and its attention has some"
    if flex and getattr(config, "attn_logit_softcapping", None):
        return "FlexAttention would cap its attention's logits, which sdpa does not"
    if config._attn_implementation not in ("sdpa", ATTENTION):
        return f"its attention is {config._attn_implementation}, and packed rows need sdpa"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if other:
        return f"it has layers of {' and '.join(other)}, whose window or state a packed row would cross"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "its layers see a sliding window, which a packed row would cross"
    if not model._supports_attention_backend or "position_ids" not in inspect.signature(model.forward).parameters:
        return "its attention function or its positions cannot be set"
    return None


def trial(model: PreTrainedModel) -> str | None:
    """Why the hidden states that the model gives for two small packed families are not those of rows, or None.

    That is what no setting tells: attention that drops the blocks or is not causal, positions that count padding. In
    half precision rounding hides what is not gross. Where weights are on no device or in parts on several, nothing is
    tried.
    """
    if any(weight.is_meta or not weight.numel() or isinstance(weight, DTensor) for weight in model.parameters()):
        return None
    ids, mask = torch.tensor([TRIED, [[int(token > 0) for token in row] for row in TRIED]], device=model.device)
    family = torch.arange(len(ids), device=model.device) // 2
    kept = mask[:, 2:] > 0
    training = [module for module in model.modules() if module.training]
    before = model.config.get_text_config()._attn_implementation
    model.eval()
    try:
        with torch.no_grad():
            wanted = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 1:-1][kept]
            use(model)
            packed = plant(ids, mask, kept.size(1), family, model.dtype)
            found = packed.rows_of(model.base_model(**packed.inputs).last_hidden_state)[kept]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"its forward does not take them ({first_line(error).rstrip('.')})"
    finally:
        model.set_attn_implementation(before)
        for module in training:
            module.training = True
    # of SmolLM2-135M in half precision: 0.04 to 0.13 where nothing is wrong, 0.2 to 0.7 with wrong positions or masks
    most = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.5
    if not (found - wanted).float().norm() <= most * wanted.float().norm():
        return "its hidden states are not those of rows, as where it is not causal or its positions count padding"
    return None


def use(model: PreTrainedModel) -> None:
    """Let the model encode packed rows; plain ones go the way they went."""
    model.set_attn_implementation(ATTENTION)


def used_by(model: PreTrainedModel) -> bool:
    """Whether `use` was called on the model, or it was made with that attention."""
    return model.config.get_text_config()._attn_implementation == ATTENTION


def _trunks(family: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B] number of each row's family from 0, [R] trunk row of each family, [B] trunk row of each row's family."""
    names, number = family.unique(return_inverse=True)
    trunks = rows.new_full((len(names),), len(rows)).scatter_reduce(0, number, rows, "amin")
    return number, trunks, trunks[number]


def _starts(sizes: Tensor, number: Tensor, families: int) -> tuple[Tensor, int]:
    """[B] the first branch column of each row, rows of a family in succession, and the most columns of a family."""
    order = number.argsort(stable=True)
    totals = sizes.new_zeros(families).scatter_add(0, number, sizes)
    starts = torch.empty_like(sizes)
    starts[order] = sizes[order].cumsum(0) - sizes[order]
    return starts - (totals.cumsum(0) - totals)[number], int(totals.max())


def _blocks(
    owner: Tensor, reach: Tensor, trunk_columns: int, positions: Tensor, dtype: torch.dtype
) -> tuple[Block, ...]:
    """Blocks for [R, M] branch columns: the row, the trunk columns seen and the position of the token in each.

    Padding (row -1) attends to padding, so that no line is empty: a softmax over nothing is NaN, and its gradient too.
    """
    columns = torch.arange(owner.size(1), device=owner.device)
    begins = torch.ones_like(owner, dtype=torch.bool)
    begins[:, 1:] = owner[:, 1:] != owner[:, :-1]
    first = columns.where(begins, 0).cummax(1).values.amin(0).tolist()
    furthest = reach.amax(0).tolist()
    size = max(LEAST_BLOCK, trunk_columns // BLOCKS_PER_TRUNK)
    blocks = []
    for start, end in itertools.pairwise(_seams(begins.sum(0).tolist(), size)):
        own, lines, until = first[start], slice(start, end), max(furthest[start:end])
        of_trunk = torch.arange(until, device=owner.device) < reach[:, lines].unsqueeze(2)
        of_branch = (owner[:, lines].unsqueeze(2) == owner[:, own:end].unsqueeze(1)) & (
            positions[:, own:end].unsqueeze(1) <= positions[:, lines].unsqueeze(2)
        )
        seen = torch.cat([of_trunk, of_branch], 2)
        mask = torch.zeros(seen.shape, dtype=dtype, device=owner.device)
        mask.masked_fill_(~seen, torch.finfo(dtype).min)
        blocks.append(Block(start, end, own, until, mask.unsqueeze(1)))
    return tuple(blocks)


def _block_mask(owner: Tensor, reach: Tensor, trunk_columns: int) -> BlockMask:
    """What each of the N + M columns sees, for [R, M] branch columns as in `_blocks`; their padding sees column 0."""
    trunk = torch.arange(trunk_columns, device=owner.device).expand(len(owner), -1)
    until = torch.cat([trunk + 1, reach.masked_fill(owner < 0, 1)], 1)
    branch = torch.cat([torch.full_like(trunk, -1), owner], 1)

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether a column attends to another: to what its branch shares, and to its branch up to itself."""
        own = (branch[row, key] == branch[row, query]) & (branch[row, query] >= 0) & (key <= query)
        return (key < until[row, query]) | own

    rows, columns = branch.shape
    # not compiled, the mask would be made whole, [R, L, L], before it is told in blocks
    make = torch.compile(create_block_mask) if owner.is_cuda else create_block_mask
    return make(sees, rows, None, columns, columns, owner.device)


def _seams(begun: list[int], size: int) -> list[int]:
    """Columns at which blocks of about `size` columns begin, and the last one's end: where most branches begin.

    A block that began inside a branch would compute keys of it that are for others. `begun` [M] branches per column.
    """
    seams = [0]
    while len(begun) - seams[-1] > size + size // 2:
        near = range(seams[-1] + max(1, size // 2), seams[-1] + size + size // 2 + 1)
        seams.append(max(near, key=lambda column: (begun[column], -abs(column - seams[-1] - size))))
    return [*seams, len(begun)] if begun else []


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
