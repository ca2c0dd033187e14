"""KDRL: GRPO and the distillation of a frozen teacher in one objective, both on the student's own completions.

Paper: Xu et al., "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning",
2025 (arXiv 2506.02208). It has no official code, and its text could not be read: the equations come from summaries.

    R_t     = log pi_T(o_t) - log pi(o_t)                              pi_T the teacher, o_t a token of the student
    kd_t    = -R_t (k1),   R_t^2 / 2 (k2),   exp(R_t) - R_t - 1 (k3)
    m_t     = 1                                  masking none
              1[the response is wrong]           masking response
              1[no response of its group is correct]  masking group
    beta(s) = max(beta - delta s, beta_min)      after s optimizer steps
    L       = L_GRPO + beta(s) sum_t m_t w_t kd_t / N                  N = tokens (normaliser all) or sum_t m_t (kept)

w is the importance weight pi / pi_old, the paper's 1 where a window is used once. What an estimator is worth as a loss
is its gradient, in expectation over o_t ~ pi_old. With KL(pi, pi_T) the reverse and KL(pi_T, pi) the forward divergence
of the next token's distributions:

    w            k1                  k2                                   k3
    none         0 (on-policy)       grad KL(pi, pi_T) (on-policy)        grad KL(pi_T, pi) (on-policy)
    detached     0                   grad KL(pi, pi_T)                    grad KL(pi_T, pi)
    live         grad KL(pi, pi_T)   grad KL(pi, pi_T) + E[w R^2/2 s]     grad KL(pi, pi_T)

with s the gradient of log pi(o_t). So k1 teaches nothing of the teacher, whose part in it is a constant, and is refused
unless its weight is live; k3 alone is another method (forward KL), and k2 with a detached weight, the default, is what
the paper sets out to minimise, also when a window is used for several steps; with `none` that is true of the first step
only, which is all that the paper's on-policy runs have. `live` differentiates the weight too, as TRL's
`use_bias_correction_kl` does with k3.

`distilled_advantage` is the form of later papers, A_t + beta(s) m_t R_t under the policy that sampled. Its gradient on-
policy is that of k2; off-policy TRL's clipped ratio weighs it with the rest of the advantage.

Ours: the weight, the two normalisers, and that beyond +-clip every kd_t goes on as a straight line, so that a token to
which the teacher gives next to no probability keeps a bounded gradient (clamping R_t would leave it none). A token
without a log-probability of the teacher is left out. As in the paper, the divergence of later tokens is not credited to
earlier ones, and GRPO's own KL is off (trainer.beta=0). The variant that sums over the teacher's K likeliest tokens is
not here.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

from rltoken.ops import group_sum, masked_mean, over_kept
from rltoken.ranges import Idle, Range, check
from rltoken.types import Progress

Coefficient = Annotated[float, Range(least=0)]
Limit = Annotated[float, Range(above=0)]
Estimator = Literal["k1", "k2", "k3"]
Importance = Literal["none", "detached", "live"]
Masking = Literal["none", "response", "group"]
Normaliser = Literal["all", "kept"]


def is_a_floor(beta_min: float, beta: float) -> None:
    """Let a smallest coefficient pass that is not above the first one."""
    Range(least=0, most=beta)(beta_min)


Floor = Annotated[float, is_a_floor, Idle("delta", 0)]


class Distillation:
    """The auxiliary loss that draws the student towards the teacher on the tokens that it sampled itself."""

    def __init__(
        self,
        *,
        beta: Coefficient = 0.002,
        delta: Coefficient = 0.0,
        beta_min: Floor = 0.0,
        estimator: Estimator = "k2",
        importance: Importance = "detached",
        masking: Masking = "none",
        normaliser: Normaliser = "all",
        clip: Annotated[Limit, Idle("estimator", "k1")] = 10.0,
    ) -> None:
        """Set it up.

        Args:
            beta: coefficient of the first step.
            delta: what it loses with each optimizer step.
            beta_min: what it does not fall below.
            estimator: of the divergence of a token.
            importance: how a token is weighted by its ratio to the policy that sampled: not, or as a constant, or with
                the ratio's own gradient.
            masking: which tokens are distilled: all, those of wrong responses, those of groups without a correct one.
            normaliser: all: the term is divided as the policy loss is; kept: scaled up by the window's tokens / tokens
                that are distilled.
            clip: nats of R beyond which the loss is a straight line.

        Raises:
            ValueError: a setting that is out of range, or k1 with a weight that is not live.
        """
        settings = {"beta": beta, "delta": delta, "beta_min": beta_min, "estimator": estimator, "clip": clip}
        settings |= {"importance": importance, "masking": masking, "normaliser": normaliser}
        check(Distillation.__init__, settings)
        if estimator == "k1" and importance != "live":
            raise ValueError(
                f"importance: {importance} leaves k1 without a gradient that knows the teacher; set it to live, or set "
                "estimator=k2"
            )
        self.beta, self.delta, self.beta_min = beta, delta, beta_min
        self.estimator, self.importance, self.clip = estimator, importance, clip
        self.masking, self.normaliser = masking, normaliser
        self.on_policy_only = importance == "none"

    def observe(self, teacher_logps: Tensor, mask: Tensor, correct: Tensor, group: Tensor) -> Tensor:
        """[B, T] what each token of the window weighs."""
        return token_weights(teacher_logps, mask, correct, group, self.masking, self.normaliser)

    def __call__(
        self, logps: Tensor, teacher_logps: Tensor, ratio: Tensor, mask: Tensor, observed: Tensor, progress: Progress
    ) -> tuple[Tensor, dict[str, float]]:
        """[B, T] coefficient times weight times estimator, and metrics.

        Args:
            logps: [B, T] of the current policy; the gradient flows through it (and through `ratio` if that is live).
            teacher_logps: [B, T].
            ratio: [B, T] to the policy that sampled.
            mask: [B, T] 1 on trained tokens.
            observed: [B, T] of `observe`.
            progress: optimizer steps done.
        """
        assert logps.shape == teacher_logps.shape == ratio.shape == mask.shape == observed.shape
        kept = (mask > 0) & (observed > 0)
        log_ratio = torch.where(kept, teacher_logps.detach() - logps, torch.zeros_like(logps))
        loss = divergence(log_ratio, self.estimator, self.clip)
        if self.importance != "none":
            weight = torch.where(kept, ratio, torch.ones_like(ratio))
            loss = loss * (weight if self.importance == "live" else weight.detach())
        beta = coefficient(progress.step, self.beta, self.delta, self.beta_min)
        metrics = {"kdrl/beta": beta, "kdrl/kept": masked_mean(kept.float(), mask).item()}
        if kept.any():
            metrics["kdrl/reverse_kl"] = -masked_mean(log_ratio.detach(), kept).item()
        return beta * observed.detach() * loss, metrics


def distilled_advantage(
    advantages: Tensor,
    old_logps: Tensor,
    teacher_logps: Tensor,
    mask: Tensor,
    correct: Tensor,
    group: Tensor,
    progress: Progress,
    *,
    beta: Coefficient = 0.002,
    delta: Coefficient = 0.0,
    beta_min: Floor = 0.0,
    masking: Masking = "none",
    normaliser: Normaliser = "all",
    clip: Limit = 10.0,
) -> Tensor:
    """[B, T] advantages plus the coefficient times R of the policy that sampled.

    Args:
        advantages: [B, T].
        old_logps, teacher_logps: [B, T].
        mask: [B, T] 1 on trained tokens.
        correct: [B] bool.
        group: [B] long.
        progress: optimizer steps done when the window was sampled.
        beta, delta, beta_min, masking, normaliser: as in `Distillation`.
        clip: nats; R lies between -clip and clip.
    """
    assert advantages.shape == old_logps.shape == teacher_logps.shape == mask.shape
    weights = token_weights(teacher_logps, mask, correct, group, masking, normaliser)
    log_ratio = torch.where(weights > 0, teacher_logps - old_logps, torch.zeros_like(old_logps))
    return advantages + coefficient(progress.step, beta, delta, beta_min) * weights * log_ratio.clamp(-clip, clip)


distilled_advantage.instead_of = Distillation
distilled_advantage.idle_at = Distillation.idle_at = {"beta": 0}


def coefficient(step: int, beta: float, delta: float, beta_min: float) -> float:
    """The coefficient after `step` optimizer steps."""
    return max(beta - delta * step, beta_min)


def token_weights(
    teacher_logps: Tensor, mask: Tensor, correct: Tensor, group: Tensor, masking: Masking, normaliser: Normaliser
) -> Tensor:
    """[B, T] 1 on the tokens that are distilled, scaled to a mean over them if `normaliser` is kept.

    Args:
        teacher_logps: [B, T]; what is not finite is unknown.
        mask: [B, T] 1 on trained tokens.
        correct: [B] bool.
        group: [B] long.
        masking, normaliser: as in `Distillation`.
    """
    kept = (mask > 0) & teacher_logps.isfinite()
    if masking == "response":
        kept = kept & ~correct.unsqueeze(1)
    elif masking == "group":
        kept = kept & (group_sum(correct.float(), group) == 0).unsqueeze(1)
    weights = kept.to(teacher_logps.dtype)
    return over_kept(weights, mask) if normaliser == "kept" else weights


def divergence(log_ratio: Tensor, estimator: Estimator, clip: float) -> Tensor:
    """[B, T] the estimator of R [B, T], with gradient; beyond `clip` its tangent there."""
    inside = log_ratio.detach().clamp(-clip, clip)
    if estimator == "k1":
        value, slope = -inside, -torch.ones_like(inside)
    elif estimator == "k2":
        value, slope = inside.square() / 2, inside
    else:
        value, slope = inside.exp() - inside - 1, inside.expm1()
    return value + slope * (log_ratio - inside)
