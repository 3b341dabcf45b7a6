"""Reference of the output layer and its cross-entropy, as one operation."""

from torch import Tensor

from minillm.kernels.reference._wide import wide
from minillm.kernels.reference.attention import cap


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Return the mean cross-entropy, in nats, of the targets under the logits x w^T.

        z = cap(x w^T);   loss = mean_n [ lse(z_n) - z_n[target_n] + z_loss lse(z_n)^2 ]
        cap(z) = softcap tanh(z / softcap), or z where softcap is 0

    x: hidden states, (N, C), any float dtype
    w: weight of the output layer, (V, C), any float dtype
    targets: right token of each row, (N,), int64
    softcap: bound of the logits (0: none)
    z_loss: weight of the squared log-sum-exp
    ignore_index: target of rows that do not count. Such rows of x may hold anything, nan too, and
        their gradient is 0

    Returns (), fp32 (fp64 for fp64 x); nan if no row counts.
    Source: z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    """
    valid = targets != ignore_index
    x, targets = x[valid], targets[valid]
    logits = cap(wide(x) @ wide(w).t(), softcap)  # (rows that count, V)
    # Not lse - picked: where logits are large, lse cannot hold the logarithm of the other tokens.
    loss = -logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square()
    return loss.mean()
