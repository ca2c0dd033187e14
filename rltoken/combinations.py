"""Which stages go with which, and with which of the trainer's arguments: the rest is refused before anything loads.

Each refusal is of a combination that would do nothing, or something else than it says. What one stage's signature or
setting rules out alone is `rltoken.pipeline`'s to refuse, what a stage returns `rltoken.running`'s.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import torch

from rltoken.errors import UserError
from rltoken.running import act, check_controlled
from rltoken.types import PUBLISHED, THINKING, Progress

if TYPE_CHECKING:
    from trl import GRPOConfig

    from rltoken.pipeline import Pipeline, Stage

logger = logging.getLogger(__name__)

TOKEN_SLOTS = ("bounds", "weights", "ratios")
METHODS = "rltoken.methods."
"""Where each file has one method: two shapes of one file are two forms of the same reward."""
ROW_LOSSES = ("grpo", "sapo", "dr_grpo", "luspo")
"""The loss types of TRL whose divisor counts rows."""
RESPONSE_MEANS = ("grpo", "sapo")
"""The loss types of TRL that average over the tokens of each response first."""


def check(pipeline: Pipeline, args: GRPOConfig, *, warn: bool = True) -> None:
    """Refuse combinations of stages, and with the trainer's arguments, that make no sense.

    Args:
        args: TRL's arguments.
        warn: also say which stages will change nothing, or have no say.

    Raises:
        UserError: names the keys, the reason and the fix.
    """
    refuse_split_groups(args.per_device_train_batch_size, args.steps_per_generation, args.num_generations)
    _check_kinds(pipeline)
    _check_published(pipeline)
    _check_rows(pipeline)
    _check_marks(pipeline)
    _check_halves(pipeline)
    _check_alternatives(pipeline)
    _check_same(pipeline)
    _check_scale(pipeline, args)
    _check_controls(pipeline, args)
    _check_sampling(pipeline, args)
    _check_nothing_is_discarded(pipeline)
    _check_nothing_is_replaced(pipeline)
    _check_token_credit(pipeline, args)
    _check_loss_type(pipeline, args)
    _check_anchor(pipeline, args)
    _check_added_rows(pipeline, args)
    _check_aggregation(pipeline, args)
    if warn:
        _warn_of_overruled_controls(pipeline, args)
        _warn_of_idle_stages(pipeline, args)


def warn_of_one_pass(pipeline: Pipeline, args: GRPOConfig, problems: int) -> None:
    """Say which stages wait for a problem to come again, where none does.

    Args:
        args: TRL's arguments.
        problems: how many there are to train on.
    """
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    drawn = args.max_steps * rows // (args.num_generations * args.num_iterations)
    if drawn > problems or (args.max_steps <= 0 and args.num_train_epochs > 1):
        return
    for stage in pipeline.stages():
        if stage.across_epochs:
            logger.warning(
                "%s: it goes by what came of a problem before, and none of the %d comes twice in this run; raise "
                "trainer.max_steps, or train on fewer, as with data.train.n.",
                stage.key,
                problems,
            )


def refuse_split_groups(batch_size: int, steps_per_generation: int, num_generations: int) -> None:
    """Refuse a window in which a rank would not hold whole groups: their statistics are taken where they are.

    Raises:
        UserError: batch_size x steps_per_generation rows of a rank are no multiple of num_generations.
    """
    rows = batch_size * steps_per_generation
    if rows % num_generations:
        raise UserError(
            f"trainer.num_generations: a group of {num_generations} would be split over ranks or windows: a rank holds "
            f"per_device_train_batch_size x steps_per_generation = {batch_size} x {steps_per_generation} = {rows} "
            "rows; make that a multiple of num_generations."
        )


def _check_controls(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Try the control stages on the first window's progress."""
    for stage in pipeline["controls"]:
        settings = _first_settings(stage, args)
        check_controlled(stage, settings, args.max_completion_length)
        for _, high in stage.clips or [(None, settings.get("epsilon_high", 1.0))]:
            _refuse_low_cap(stage.key, high, args)
        if settings.get("stop_at_think_end"):
            _check_answers_are_forced(stage, pipeline)


def _first_settings(stage: Stage, args: GRPOConfig) -> Any:
    """What a control stage returns for the first window; a copy of it, since it may count its calls."""
    return stage.copy().run({"progress": Progress(0, args.max_steps), "last_window": None})


def _check_answers_are_forced(stage: Stage, pipeline: Pipeline) -> None:
    """Refuse a control that stops sampling at the end of thinking where a reward is needed before there is any."""
    if not pipeline["rows"]:
        raise UserError(
            f"{stage.key}: sampling stops at the end of thinking, so there is no answer to grade; add a rows stage "
            "that forces answers, such as +rows=brpo."
        )
    if pipeline["rows"][0].replaces_rows:
        raise UserError(
            f"{pipeline['rows'][0].key}: there is no reward yet, since sampling stops at the end of thinking; leave "
            f"out the control stage that stops it, by ~{stage.key}."
        )


def _check_sampling(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Refuse to change logits where the back end would not, or where nothing could be compared any more."""
    if not pipeline.changes_logits:
        return
    changing = next(stage for stage in pipeline["controls"] if stage.changes_logits)
    key, temperature = changing.key, getattr(changing.call, "temperature", args.temperature)
    if temperature != args.temperature:
        raise UserError(
            f"{key}.temperature: it moves around {temperature:g}, while sampling and its entropies are at "
            f"trainer.temperature={args.temperature:g}; leave it out, and set trainer.temperature."
        )
    if args.use_transformers_continuous_batching:
        raise UserError(
            f"trainer.use_transformers_continuous_batching: its generation takes no change of the logits, which {key} "
            "makes; set it to false."
        )
    if args.repetition_penalty != 1:
        raise UserError(
            f"trainer.repetition_penalty: {key} sees the logits before the penalty with one back end and after it with "
            "the other; set it to 1."
        )
    plain = args.temperature == 1 and args.top_p == 1 and (args.top_k or -1) < 0 and not args.min_p
    compared = args.vllm_importance_sampling_correction or args.off_policy_mask_threshold is not None
    if args.use_vllm and compared and not plain:
        raise UserError(
            f"trainer.temperature: with {key} vLLM gives the log-probabilities of the model's own distribution, to be "
            "compared with the trainer's; set trainer.temperature=1 trainer.top_p=1 trainer.top_k=0 trainer.min_p=null "
            "or trainer.vllm_importance_sampling_correction=false, without trainer.off_policy_mask_threshold."
        )


def _check_kinds(pipeline: Pipeline) -> None:
    for stage in pipeline.stages():
        if THINKING not in stage.kinds and not pipeline["rows"]:
            raise UserError(
                f"{stage.key}.kinds: there are only rows of the kind '{THINKING}' without a rows stage, so it would do "
                f"nothing on {', '.join(stage.kinds)}; add one with +rows=..., or set it to [{THINKING}]."
            )


def _check_published(pipeline: Pipeline) -> None:
    """Refuse stages that name what no rows stage publishes, and rows stages that sample for nobody."""
    for stage in pipeline.stages() + pipeline.observers:
        for name in stage.needs:
            if name in PUBLISHED and not pipeline["rows"]:
                raise UserError(
                    f"{stage.key}: no rows stage publishes '{name}'; add one that does with '+rows=...', or choose "
                    "the method whole with '+exp=...'."
                )
    for stage in pipeline["rows"]:
        if stage.only_for and not pipeline.needs(stage.only_for):
            raise UserError(
                f"{stage.key}: no stage names '{stage.only_for}', so what it samples would be thrown away; choose the "
                "method whole with '+exp=...', or leave it out."
            )


def _check_rows(pipeline: Pipeline) -> None:
    """Refuse to replace thinking rows from which others have been grown."""
    for earlier, stage in itertools.pairwise(pipeline["rows"]):
        if stage.replaces_rows:
            raise UserError(
                f"{stage.key}: it replaces thinking rows, so it must come before {earlier.key}; choose them in the "
                f"other order, as '+rows=[{stage.name},{earlier.name}]', or +rows={stage.name} before +exp=..."
            )


def _check_marks(pipeline: Pipeline) -> None:
    for mark in pipeline["marks"]:
        if not pipeline.needs(mark.name):
            raise UserError(f"{mark.key}: no stage names '{mark.name}', so it would do nothing; leave it out.")


def _check_halves(pipeline: Pipeline) -> None:
    """Refuse a stage without the other one that its method is made of."""
    for stage in pipeline.stages():
        if stage.only_with and not any(other.is_of(stage.only_with) for other in pipeline.stages()):
            raise UserError(
                f"{stage.key}: alone it is half a method, whose other half is {stage.only_with.__module__}."
                f"{stage.only_with.__name__}; choose the method whole with '+exp=...', or leave it out."
            )


def _check_alternatives(pipeline: Pipeline) -> None:
    """Refuse two forms of one method, each of which would add its own terms."""
    chosen: dict[str, str] = {}
    for stage in pipeline["shapes"]:
        if stage.home.startswith(METHODS) and stage.home in chosen:
            raise UserError(
                f"{stage.key}: it is another form of {chosen[stage.home]}, and each would add its terms to the reward; "
                "leave one of them out."
            )
        chosen[stage.home] = stage.key
    for stage, other in itertools.permutations(pipeline.stages(), 2):
        if stage.instead_of and other.is_of(stage.instead_of):
            raise UserError(
                f"{stage.key}: it is another form of {other.key}, and the two would act twice; leave one of them out."
            )


def _check_same(pipeline: Pipeline) -> None:
    """Refuse two values of one quantity that two stages have as a setting each."""
    for stage, other in itertools.permutations(pipeline.stages(), 2):
        for name in (name for name, call in (stage.same_as or {}).items() if other.is_of(call)):
            if stage.setting(name) != other.setting(name):
                raise UserError(
                    f"{stage.key}.{name}: it is {stage.setting(name)} where {other.key}.{name} is "
                    f"{other.setting(name)}, and they are one quantity; leave it out, and set {other.key}.{name}."
                )


def _check_scale(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Refuse to mix standardised credit into TRL's advantages where these are in units of the reward."""
    for stage in pipeline["credits"]:
        if "advantages" not in stage.needs and THINKING in stage.kinds:
            return  # it makes advantages of its own
        if stage.among_standardised and args.scale_rewards == "none":
            raise UserError(
                f"trainer.scale_rewards: 'none' leaves advantages in units of the reward, while {stage.key} mixes them "
                "with something in standard deviations of the group; set it to group."
            )


def _check_nothing_is_discarded(pipeline: Pipeline) -> None:
    """Refuse what a stage that computes rewards, or advantages of thinking rows, anew would leave without effect."""
    for earlier, stage in itertools.pairwise(pipeline["shapes"]):
        if stage.relabels:
            raise UserError(
                f"{earlier.key}: {stage.key} comes after it and makes rewards of its own, so it would do nothing; "
                "choose them in the other order, as '+shape=[vote,other]', or leave one out."
            )
    chain = [stage for stage in pipeline["credits"] if THINKING in stage.kinds]
    for earlier, stage in itertools.pairwise(chain):
        if "advantages" not in stage.needs:
            other_order = "choose them in the other order, as +credit=[first,second], or leave one out"
            raise UserError(
                f"{earlier.key}: {stage.key} comes after it and computes the advantages anew, so it would do nothing; "
                f"{other_order if 'advantages' in earlier.needs else 'leave one out'}."
            )
    if pipeline["shapes"] and chain and {"advantages", "rewards"}.isdisjoint(chain[0].needs):
        raise UserError(
            f"{pipeline['shapes'][0].key}: {chain[0].key} takes its credit from something else than the reward, so a "
            "shaped reward would do nothing; leave one of them out."
        )


def _check_nothing_is_replaced(pipeline: Pipeline) -> None:
    """Refuse bounds and ratios whose every row gets those of a later stage, which does not build on them."""
    for slot in ("bounds", "ratios"):
        in_order = pipeline.stages(slot, live=False) + pipeline.stages(slot, live=True)
        for earlier, stage in itertools.combinations(in_order, 2):
            if set(earlier.kinds) <= set(stage.kinds) and {"eps_low", "eps_high"}.isdisjoint(stage.needs):
                raise UserError(
                    f"{earlier.key}: {stage.key} acts on the same rows after it and replaces what it gives, so it "
                    "would do nothing; leave one of them out."
                )


def _check_token_credit(pipeline: Pipeline, args: GRPOConfig) -> None:
    token_stages = [*pipeline.stages(*TOKEN_SLOTS), *(stage for stage in pipeline["credits"] if stage.per_token)]
    if token_stages and args.importance_sampling_level == "sequence":
        raise UserError(
            f"trainer.importance_sampling_level: 'sequence' averages the ratio over a response and so erases the "
            f"per-token effect of {token_stages[0].key}; set it to 'token' and add '+ratio=gspo_token'."
        )


def _check_loss_type(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Refuse losses in which a stage would do nothing, or something else than it says."""
    token_stages = pipeline.stages(*TOKEN_SLOTS)
    if args.loss_type == "vespo" and (pipeline["credits"] or token_stages):
        raise UserError(
            f"trainer.loss_type: 'vespo' weighs whole sequences, so {(pipeline['credits'] or token_stages)[0].key} "
            "cannot act on its tokens; use grpo, dr_grpo, dapo or cispo."
        )
    if pipeline["bounds"] and args.loss_type == "sapo":
        raise UserError(
            f"trainer.loss_type: 'sapo' does not clip, so {pipeline['bounds'][0].key} would do nothing; "
            "use grpo, dr_grpo, dapo, bnpo, luspo or cispo."
        )
    if args.loss_type == "cispo" and (around := [stage.key for stage in pipeline["bounds"] if stage.around_one]):
        raise UserError(
            f"trainer.loss_type: 'cispo' caps the ratio at trainer.epsilon_high itself, while {around[0]} gives "
            "distances from a ratio of 1; use grpo, dr_grpo or dapo."
        )
    means = [stage.key for stage in token_stages if stage.per_response]
    if means and args.loss_type not in RESPONSE_MEANS:
        raise UserError(
            f"trainer.loss_type: '{args.loss_type}' sums over the tokens of a response, so the importance weight that "
            f"{means[0]} makes of their mean would count once per token; use {' or '.join(RESPONSE_MEANS)}."
        )
    for stage in pipeline["bounds"]:
        if not stage.needs:
            # a copy, since it may count its calls
            _, cap = act(stage.copy(), {}, *torch.ones(2, 1), kinds=stage.kinds[:1])
            _refuse_low_cap(stage.key, cap.item(), args)
    if not pipeline["bounds"]:
        _refuse_low_cap("trainer.epsilon_high", _epsilon_high(args), args)


def _refuse_low_cap(key: str, cap: float, args: GRPOConfig) -> None:
    """Refuse a distance from a ratio of 1 as the ratio at which CISPO caps."""
    if args.loss_type == "cispo" and cap < 1:
        raise UserError(
            f"{key}: trainer.loss_type=cispo caps the ratio itself, here at {cap:g}, so that even on-policy, at a "
            "ratio of 1, every update shrinks to that share; set 1 or more (TRL recommends 5), or another loss type."
        )


def _epsilon_high(args: GRPOConfig) -> float:
    """The upper clip range, which is the lower one unless it is set."""
    return args.epsilon if args.epsilon_high is None else args.epsilon_high


def _check_anchor(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Refuse TRL's KL term, which no weight reaches, beside an anchor that follows the weights."""
    for stage in pipeline["aux"]:
        if {"ref_logps", "weight"} <= set(stage.needs) and args.beta != 0.0:
            raise UserError(
                f"trainer.beta: {args.beta:g} would add TRL's KL term on every token, while {stage.key} anchors only "
                "the tokens that the weights keep; set trainer.beta=0, and the strength by the stage's own setting."
            )


def _warn_of_overruled_controls(pipeline: Pipeline, args: GRPOConfig) -> None:
    set_by: dict[str, str] = {}
    for stage in pipeline["controls"]:
        settings = _first_settings(stage, args)
        for name in settings.keys() & set_by.keys():
            logger.warning("%s: it sets %s too, so that %s has no say in it.", stage.key, name, set_by[name])
        set_by |= dict.fromkeys(settings, stage.key)


def _warn_of_idle_stages(pipeline: Pipeline, args: GRPOConfig) -> None:
    """Say which stages will change nothing, or something else than they say, in this run or beside these stages."""
    stages = pipeline.stages()
    updates = args.num_iterations * args.steps_per_generation / args.gradient_accumulation_steps
    idle = [*pipeline["bounds"], *(stage for stage in stages if stage.off_policy_only)]
    if idle and updates <= 1:
        logger.warning(
            "%s: each window is trained in one optimizer step, where every ratio is 1, so it changes nothing; set "
            "trainer.num_iterations=2, or trainer.steps_per_generation above trainer.gradient_accumulation_steps.",
            ", ".join(stage.key for stage in idle),
        )
    for stage in stages:
        if stage.on_policy_only and updates > 1:
            logger.warning(
                "%s.importance: each window is trained in %g optimizer steps, and without a weight by the ratio the "
                "gradient is that of the divergence in the first one alone; set it to detached.",
                stage.key,
                updates,
            )
        if stage.idle_at and all(stage.setting(name) == value for name, value in stage.idle_at.items()):
            logger.warning(
                "%s: with %s it changes nothing; set another value, or leave the stage out with '~%s'.",
                stage.key,
                " and ".join(f"{name}={value}" for name, value in stage.idle_at.items()),
                stage.key,
            )
        if 0 < args.max_steps <= stage.after:
            logger.warning(
                "%s.after: it begins after %d optimizer steps, and trainer.max_steps=%d ends the run before; lower it.",
                stage.key,
                stage.after,
                args.max_steps,
            )
    for stage in pipeline["controls"]:
        if _sets_what_is_configured(stage, args):
            logger.warning(
                "%s: in the first and in the last step of the run it sets what is configured anyway; begin earlier, or "
                "raise trainer.max_steps=%d.",
                stage.key,
                args.max_steps,
            )
    for stage in pipeline["weights"]:
        # a credit may give groups an advantage that have none by their rewards
        if stage.only_for and not pipeline.needs(stage.only_for) and not pipeline["credits"]:
            logger.warning(
                "%s: it matters to stages that name '%s' alone, and there is none; add one, or leave it out.",
                stage.key,
                stage.only_for,
            )


def _sets_what_is_configured(stage: Stage, args: GRPOConfig) -> bool:
    """Whether a control that goes by the progress alone changes nothing at either end of a run of a known length."""
    if set(stage.needs) - {"progress"} or stage.observer or hasattr(stage.call, "state_dict") or args.max_steps <= 0:
        return False
    configured = {
        "max_completion_length": args.max_completion_length,
        "epsilon": args.epsilon,
        "epsilon_high": _epsilon_high(args),
    }
    ends = (Progress(step, args.max_steps) for step in (0, args.max_steps - 1))
    return all(stage.copy().run({"progress": progress}).items() <= configured.items() for progress in ends)


def _check_added_rows(pipeline: Pipeline, args: GRPOConfig) -> None:
    if not pipeline["rows"]:
        return
    key = pipeline["rows"][0].key
    if args.loss_type == "bnpo":
        raise UserError(
            f"trainer.loss_type: 'bnpo' divides by the tokens of a micro-batch, so the rows that {key} may add would "
            "change its divisor at random; use dapo, dr_grpo or grpo."
        )
    if args.mask_truncated_completions:
        raise UserError(
            f"trainer.mask_truncated_completions: {key} may add rows that end without an end-of-sequence token, which "
            "this would silently mask; set it to false."
        )
    if args.entropy_coef or args.use_adaptive_entropy:
        raise UserError(
            f"trainer.entropy_coef: TRL's entropy bonus would also act on the rows that {key} may add; use "
            "'+aux=entropy_bonus' instead, which acts on thinking rows."
        )


def _check_aggregation(pipeline: Pipeline, args: GRPOConfig) -> None:
    if pipeline["shapes"] and args.multi_objective_aggregation != "sum_then_normalize":
        raise UserError(
            f"{pipeline['shapes'][0].key}: a shape stage needs the weighted sum of the rewards, which "
            f"trainer.multi_objective_aggregation={args.multi_objective_aggregation} never forms; set it to "
            "sum_then_normalize."
        )
