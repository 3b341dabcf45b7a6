"""Hyperbolic tangent for soft-caps, which Triton does not have."""

import triton
import triton.language as tl


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """Return tanh(x), exact to 2e-7, or with EXACT to two units in the last place.

    Near zero, where the other formula loses digits, EXACT takes the polynomial of tanhf in Cephes
    (S. Moshier, 1989).

    x: block of numbers, fp32
    EXACT: whether the result is exact to two units in the last place
    """
    if EXACT:
        y = x * x
        near = -5.70498872745e-3 * y + 2.06390887954e-2
        near = (near * y - 5.37397155531e-2) * y + 1.33314422036e-1
        near = (near * y - 3.33332819422e-1) * y * x + x
        far = 1 - 2 / (tl.exp2(2.8853900817779268 * tl.abs(x)) + 1)  # 2 log2(e)
        t = tl.where(y < 0.390625, near, tl.where(x < 0, -far, far))  # 0.625^2
    else:
        t = 1 - 2 / (tl.exp2(2.8853900817779268 * x) + 1)
    return t
