"""Eager: every operation as PyTorch runs it fastest, without a kernel of ours.

The functions have the names and signatures of kernels/reference/, which defines them. The
files have the same names too, so that a reader can lay the two side by side. minillm.ops.EAGER
holds all of them as one table.

    norms.py      rms_norm, add_rms_norm, sandwich_norm
    rope.py       rope, rope_cache
    attention.py  attention, decode_attention
    mlp.py        swiglu, geglu, relu2
    loss.py       linear_cross_entropy
    optim.py      adamw, newton_schulz
    sampling.py   uniform, sample

The two files worth reading are attention.py and loss.py, where PyTorch's first answer is not its
fastest.
"""
