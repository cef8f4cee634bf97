"""Training losses as formulas over the head's statistics per token: a new loss costs one line and no kernel."""

from torch import Tensor

from muonlab.models.head import HeadStats
from muonlab.training.config import LossOptions

LOSSES = {
    "cross-entropy": "lse - t, the default and always the evaluation",
    "label smoothing": "loss.label_smoothing a: cross-entropy + a (t - mean logit)",
    "focal": "loss.focal_gamma g: (1 - p)^g x cross-entropy",
    "z-loss": "loss.z_loss w: + w lse^2",
}


def cross_entropy(stats: HeadStats) -> Tensor:
    """Next-token cross-entropy per token in nats [N]: log-sum-exp of the logits minus the target's logit."""
    return stats.lse - stats.target_logit


def weighs_tokens_equally(options: LossOptions) -> bool:
    """Whether the mean of `training_loss` has the same slope in every token's log-sum-exp."""
    return options.focal_gamma == 0 and options.z_loss == 0


def training_loss(stats: HeadStats, options: LossOptions) -> Tensor:
    """The optimised objective per token [N] in nats.

    Label smoothing: Szegedy et al. 2016 (1512.00567); focal: Lin et al. 2017 (1708.02002); z-loss: PaLM (2204.02311).
    """
    loss = cross_entropy(stats)
    confidence_gap = -(-loss).expm1() if options.focal_gamma else None  # 1 - p of the target, exact near p = 1
    if options.label_smoothing:
        loss = loss + options.label_smoothing * (stats.target_logit - stats.mean_logit)
    if confidence_gap is not None:
        # p = 1 to rounding makes the gap 0, where a power below 1 has no finite slope
        loss = confidence_gap.clamp_min(1e-12) ** options.focal_gamma * loss
    if options.z_loss:
        loss = loss + options.z_loss * stats.lse**2
    return loss
