"""The Triton AdamW answers to the reference, after several steps of many parameters."""

import pytest
import torch
from hypothesis import strategies as st

from minillm.kernels import adamw as room
from minillm.kernels.adamw import adamw
from minillm.ops import REFERENCE
from tests.support.broad import broad, searched

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A scalar, nothing, odd sizes, one block, a block and one more, more than one program.
SHAPES = [(), (0, 3), (5, 7), (1024,), (1025,), (2, 3, 4), (9, 1000)]


def normal(shapes, dtype, device, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=numbers).to(device, dtype) for s in shapes]


def rates(n):
    """A rate and a decay for each parameter, all different, one of each zero."""
    return [3e-3 * i for i in range(n)], [0.3 * (n - 1 - i) for i in range(n)]


def stepped(op, shapes, grad, copy, device, steps=3, wide=torch.float32, **options):
    """p, m, v and copies after some steps by op, with its state in the dtype `wide`."""
    lr, weight_decay = rates(len(shapes))
    p = normal(shapes, wide, device)
    m, v = ([torch.zeros_like(x) for x in p] for _ in range(2))
    exact = wide == torch.float64
    copies = copy and [torch.empty_like(x, dtype=wide if exact else copy) for x in p]
    for step in range(1, steps + 1):
        g = normal(shapes, grad, device, seed=step)
        if exact:
            g = [x.double() for x in g]
        op(p, g, m, v, step, lr=lr, weight_decay=weight_decay, copies=copies, **options)
    return p + m + v + (copies or [])


def check_steps(compare, *args, op=adamw, **options):
    compare(
        stepped(op, *args, **options),
        stepped(REFERENCE.adamw, *args, **options),
        stepped(REFERENCE.adamw, *args, wide=torch.float64, **options),
    )


@pytest.mark.parametrize("grad", DTYPES, ids=str)
@broad("copy", [None, *DTYPES], quick=(0, 3), ids=str)
def test_values(compare, device, launches, grad, copy):
    """One launch a step, for every dtype of gradients and copies."""
    check_steps(compare, SHAPES, grad, copy, device)
    assert launches == {"_adamw_kernel": 3}


@searched(
    3,
    10,
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    grad=st.sampled_from(DTYPES),
    betas=st.sampled_from([(0.9, 0.95), (0.0, 0.999), (0.95, 0.0)]),
    eps=st.sampled_from([1e-8, 1e-3]),
)
def test_any_size(compare, device, sizes, grad, betas, eps):
    shapes = [(n,) for n in sizes]
    check_steps(compare, shapes, grad, None, device, betas=betas, eps=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_scale(compare, device, dtype):
    """The factor is read on the device, and multiplies in fp32."""
    scale = torch.tensor(1 / 3, device=device)
    check_steps(compare, SHAPES, dtype, None, device, grad_scale=scale)


def test_late_step(compare, device):
    """The corrections 1 - b^step of a step in the thousands, from a state that is not zero."""

    def late(op, wide):
        p, m, v = (normal([(300,)], torch.float32, device, seed=i) for i in range(3))
        lists = [[x.to(wide) for x in xs] for xs in (p, m, [x.abs() for x in v])]
        g = [x.to(wide) for x in normal([(300,)], torch.bfloat16, device, seed=3)]
        op(lists[0], g, *lists[1:], 5000, lr=[1e-2], weight_decay=[0.1])
        return lists[0] + lists[1] + lists[2]

    results = [late(op, torch.float32) for op in (adamw, REFERENCE.adamw)]
    compare(*results, late(REFERENCE.adamw, torch.float64))


def test_views(compare, device, launches):
    """At odd addresses, amid numbers that stay; gradients in any strides; two launches a step."""
    n = 2500
    aligned, shifted = (torch.full((4, n + 12), 7.0, device=device) for _ in range(2))
    copies = torch.full((2, n + 9), 7.0, device=device, dtype=torch.bfloat16)
    gradient = normal([(n, 2)], torch.bfloat16, device)[0]

    def lists(first):
        rows = [aligned[i, 4 : n + 4] for i in range(3)], [shifted[i, 3 : n + 3] for i in range(3)]
        for p, m, v in rows:
            p.copy_(normal([(n,)], torch.float32, device)[0])
            m.zero_(), v.zero_()
        return [[row[i] for row in rows] for i in range(3)]

    p, m, v = lists(0)
    grads = [gradient[:, 0], gradient[:, 1]]
    halves = [copies[0, 8 : n + 8], copies[1, 1 : n + 1]]
    adamw(p, grads, m, v, 1, lr=[1e-2] * 2, weight_decay=[0.1] * 2, copies=halves)
    assert launches == {"_adamw_kernel": 2}
    ours = [x.clone() for x in p + m + v + halves]
    p, m, v = lists(0)
    REFERENCE.adamw(p, grads, m, v, 1, lr=[1e-2] * 2, weight_decay=[0.1] * 2, copies=halves)
    plain = [x.clone() for x in p + m + v + halves]
    p, m, v = ([x.double() for x in xs] for xs in lists(0))
    wide = [x.double() for x in halves]
    grads = [x.double() for x in grads]
    REFERENCE.adamw(p, grads, m, v, 1, lr=[1e-2] * 2, weight_decay=[0.1] * 2, copies=wide)
    compare(ours, plain, p + m + v + wide)
    outside = aligned[:3, :4], aligned[:3, n + 4 :], shifted[:3, :3], shifted[:3, n + 3 :]
    copied = copies[0, :8], copies[0, n + 8 :], copies[1, :1], copies[1, n + 1 :]
    assert all((x == 7).all() for x in outside + copied)


def test_mixed_gradients(device, launches):
    """Gradients of two dtypes: two launches, and the bits that each would give by itself."""
    shapes = [(30,), (40,)]
    g = normal(shapes[:1], torch.bfloat16, device) + normal(shapes[1:], torch.float32, device)
    together, alone = ([normal(shapes, torch.float32, device, s) for s in range(3)] for _ in "ab")
    for state in (together, alone):
        state[2] = [x.abs() for x in state[2]]
    adamw(together[0], g, *together[1:], 4, lr=[0.1, 0.2], weight_decay=[0.1, 0.2])
    assert launches == {"_adamw_kernel": 2}
    for i in range(2):
        p, m, v = ([xs[i]] for xs in alone)
        adamw(p, [g[i]], m, v, 4, lr=[0.1 * (i + 1)], weight_decay=[0.1 * (i + 1)])
    assert all(map(torch.equal, sum(together, []), sum(alone, [])))


def test_nothing_to_do(device, launches):
    """No parameter, or none with a number: no launch."""
    adamw([], [], [], [], 1, lr=[], weight_decay=[])
    empty = [torch.ones(0, device=device)]
    adamw(empty, empty, [empty[0].clone()], [empty[0].clone()], 1, lr=[1.0], weight_decay=[0.0])
    assert not launches


def test_repeats(device):
    """Twice the same bits."""
    runs = [stepped(adamw, SHAPES, torch.bfloat16, torch.bfloat16, device) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@broad(
    ("old", "new"),
    [
        ("p -= decay * p", "p += decay * p"),
        ("+ rate * m /", "- rate * m /"),
        ("elif start < length:", "elif start < 0:"),
        ("for i in range(BLOCKS):", "for i in range(BLOCKS - 1):"),
        ("(program - first)", "program"),
        ("to(tl.float32) * scale", "to(tl.float32)"),
        ("v = b2 * v", "v = v"),
        ("rates[:, 0] /= 1 - b1**step", "rates[:, 0] /= 1 - b1"),
        ("(1 - b2**step) ** -0.5", "1.0"),
        ("p.to(COPY)", "m.to(COPY)"),
        ("np.arange(len(rows), dtype=np.int32)", "np.zeros(len(rows), dtype=np.int32)"),
    ],
    quick=(0, 1, 7),
)
def test_a_broken_copy_is_seen(broken, compare, device, old, new):
    copy = broken(room, old, new)
    shapes = [(5, 7), (9, 1000), (1024,)]
    scale = torch.tensor(0.5, device=device)
    with pytest.raises(AssertionError):
        check_steps(
            compare, shapes, torch.bfloat16, torch.bfloat16, device, op=copy.adamw, grad_scale=scale
        )


def test_a_missing_mask_is_seen(broken, device):
    """What follows a tensor in memory stays, which a copy without masks does not respect."""
    copy = broken(room, "at < length - start if MASKED", "at < BLOCK if MASKED")
    for op, stays in ((adamw, True), (copy.adamw, False)):
        p, g, m, v = (torch.ones(2048, device=device) for _ in range(4))
        op([p[:100]], [g[:100]], [m[:100]], [v[:100]], 1, lr=[0.1], weight_decay=[0.1])
        assert bool((p[100:] == 1).all()) is stays


def arguments(device, copies=True):
    """Positional arguments of the operation itself."""
    p, g, m, v, c = (normal([(3, 5), (7,)], torch.float32, device, seed=i) for i in range(5))
    v = [x.abs() for x in v]
    scale = torch.tensor(0.5, device=device)
    return p, g, m, v, c if copies else [], scale, 2, [0.1, 0.2], [0.1, 0.0], 0.9, 0.95, 1e-8


def test_opcheck(device):
    torch.library.opcheck(room._adamw, arguments(device))
    torch.library.opcheck(room._adamw, arguments(device, copies=False))


def test_compiled_whole(device):
    def step(p, g, m, v):
        adamw(p, g, m, v, 3, lr=[0.1, 0.2], weight_decay=[0.1, 0.0])

    ours, compiled = arguments(device)[:4], arguments(device)[:4]
    step(*ours)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(map(torch.equal, sum(ours, []), sum(compiled, [])))


def test_refusals(device):
    """Each list is named in what is said of it."""
    one = torch.ones(4, 4, device=device)

    def call(step=1, rate=(0.1,), **lists):
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
        four = {n: lists.get(n, [one.clone()]) for n in names}
        rest = {n: x for n, x in lists.items() if n not in names}
        adamw(**four, step=step, lr=list(rate), weight_decay=[0.1], **rest)

    for name in ("params", "exp_avgs", "exp_avg_sqs", "copies"):
        with pytest.raises(ValueError, match=f"^{name}: .* strides"):
            call(**{name: [one[:, :2].t() if name == "params" else one.t()[:, [1, 0, 2, 3]].t()]})
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "copies"):
        with pytest.raises(ValueError, match=f"^{name}: .* torch.float64"):
            call(**{name: [one.double()]})
        if name != "params":
            with pytest.raises(ValueError, match=f"^{name}: .*\\(2, 4\\)"):
                call(**{name: [one[:2]]})
            with pytest.raises(ValueError, match=f"^{name}: 2 of them"):
                call(**{name: [one, one]})
    with pytest.raises(ValueError, match="^params: .* torch.bfloat16"):
        call(params=[one.bfloat16()])
    with pytest.raises(ValueError, match="^lr: 2 of them"):
        call(rate=(0.1, 0.2))
    with pytest.raises(ValueError, match="^grad_scale: "):
        call(grad_scale=one)
    with pytest.raises(ValueError, match="^step: 0"):
        call(step=0)
