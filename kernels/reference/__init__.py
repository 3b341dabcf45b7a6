"""Reference: the maths of every operation in plain PyTorch, slow, in at least fp32.

A change in this folder changes what an operation means. A change in kernels/eager/ or in a Triton
file changes only its speed: each of their functions has the name and the signature of one here,
and the tests judge it by the one here. minillm.ops.REFERENCE holds all of them as one table.

    norms.py      rms_norm, add_rms_norm, sandwich_norm
    rope.py       rope, rope_cache
    attention.py  attention, decode_attention
    mlp.py        swiglu, geglu, relu2
    loss.py       linear_cross_entropy
    optim.py      adamw, newton_schulz
    sampling.py   uniform, sample

Read norms.py first. Letters in shapes: B batch, T queries, S keys, C model width, H query heads,
G key/value heads, D head width, F MLP width, V vocabulary, N rows.
"""
