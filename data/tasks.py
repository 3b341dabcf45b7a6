"""Make prepared corpora of tasks that need depth, whose sequences have their own targets.

    python data/tasks.py register --out data/prepared/register
    python train.py --data data/prepared/register --recurrent 1,1,1

Every token is a character. Sequences depend on the task, its sizes and the seed. Those of "train"
and of "val" are drawn independently. Hops are the number of steps that lead to an answer.
"""

import inspect
import itertools
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HOME = Path(__file__).resolve().parents[1]
IGNORED = -100
TRIES = 100
MOST = 1 << 26  # largest number of tokens of a part, which takes about 64 bytes per token
LETTERS = string.ascii_uppercase + string.ascii_lowercase


@dataclass(frozen=True)
class Task:
    """A task of given sizes.

    alphabet: its tokens
    length: T, number of tokens of a sequence
    draw: function from a random generator and a count to tokens, targets and hops, (count, T) int64
        each; hops are -1 where there is no target
    """

    alphabet: str
    length: int
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def permutations(states: int, count: int) -> np.ndarray:
    """Return some permutations without the identity, always the same ones, (count, states).

    states: number of values that are permuted
    count: number of permutations
    """
    every = [p for p in itertools.permutations(range(states)) if p != tuple(range(states))]
    if count > len(every):
        raise ValueError(f"--operations {count}: there are {len(every)} of {states} states")
    chosen = np.random.default_rng(4).permutation(len(every))[:count]
    return np.array([every[i] for i in chosen])


def register(states: int = 4, operations: int = 6, length: int = 32, chain: bool = False) -> Task:
    """Return the task of a register that tokens set to a value, or permute.

    The answer at each token is the register's value. Token 0 sets it. The share of sets is drawn
    for
    each sequence from 0.03 to 0.5. Hops are the tokens since the last set.

    states: number of values of the register
    operations: number of permutations
    length: tokens of a sequence
    chain: True for one set and then operations only, for tests
    """
    tables = np.concatenate([np.repeat(np.arange(states)[:, None], states, 1),
                             permutations(states, operations)])  # fmt: skip

    def draw(numbers: np.random.Generator, count: int):
        share = 0.0 if chain else 0.03 + 0.47 * numbers.random((count, 1))
        sets = numbers.random((count, length)) < share
        sets[:, 0] = True
        values = numbers.integers(states, size=sets.shape)
        tokens = np.where(sets, values, states + numbers.integers(operations, size=sets.shape))
        answers, hops = np.empty_like(tokens), np.empty_like(tokens)
        now = age = np.zeros(count, np.int64)
        for t in range(length):
            now = tables[tokens[:, t], now]
            age = np.where(sets[:, t], 0, age + 1)
            answers[:, t], hops[:, t] = now, age
        return tokens, answers, hops

    return Task(string.digits[:states] + LETTERS[:operations], length, draw)


def registers(
    states: int = 4, operations: int = 3, length: int = 32, registers: int = 3,
    chain: bool = False,
) -> Task:  # fmt: skip
    """Return the task of several registers, which depend on one another.

    A token sets a register, or makes it a permutation of another (r_i <- g(r_j)). The answer at
    each
    token is the value of the register that it writes. Depth and distance differ: hops are the
    writes
    behind a value, through any registers that it came. Tokens are first all sets (register, value),
    then all operations (i, g, j).

    states: number of values of a register
    operations: number of permutations
    length: tokens of a sequence
    registers: number of registers
    chain: True for one set and then operations only, for tests
    """
    K, M, G = registers, states, operations
    tables = permutations(M, G)
    n_sets = K * M
    if n_sets + K * G * K > len(LETTERS + string.digits):
        raise ValueError("more tokens than characters; take fewer states, registers or operations")

    def draw(numbers: np.random.Generator, count: int):
        share = 0.0 if chain else 0.03 + 0.47 * numbers.random((count, 1))
        sets = numbers.random((count, length)) < share
        sets[:, 0] = True
        i, j = numbers.integers(K, size=(2, count, length))
        value = numbers.integers(M, size=sets.shape)
        g = numbers.integers(G, size=sets.shape)
        held = numbers.integers(M, size=(count, K))  # before a register is first set
        depth = np.full((count, K), -1)
        rows = np.arange(count)
        tokens = np.where(sets, i * M + value, n_sets + (i * G + g) * K + j)
        answers, hops = np.full_like(tokens, IGNORED), np.full_like(tokens, -1)
        for t in range(length):
            source, known = held[rows, j[:, t]], depth[rows, j[:, t]]
            new = np.where(sets[:, t], value[:, t], tables[g[:, t], source])
            deep = np.where(sets[:, t], 0, np.where(known < 0, -1, known + 1))
            held[rows, i[:, t]], depth[rows, i[:, t]] = new, deep
            answers[:, t] = np.where(
                deep < 0, IGNORED, new
            )  # it depends on a value that was never set
            hops[:, t] = deep
        return tokens, answers, hops

    return Task("".join(sorted(LETTERS + string.digits))[: n_sets + K * G * K], length, draw)


def _hopped(x: np.ndarray) -> int:
    """Return the position to which x[0] + 1 hops back from the end lead; 0 if there is none."""
    at = len(x) - 1
    for _ in range(x[0] + 1):
        before = np.flatnonzero(x[1:at] == x[at])
        if not len(before):
            return 0
        at = before[-1] + 2  # what followed it
    return at


def hop(states: int = 4, length: int = 64, hops: int = 4) -> Task:
    """Return the task of p-hop induction.

    Each hop goes back to the last time that the current letter occurred, and takes the letter after
    it.
    The first token is p, from 1 to `hops`, and the answer is at the last token.

    states: number of letters
    length: tokens of a sequence
    hops: largest p
    Source: Sanford et al. 2024, arXiv:2402.09268, section 4; Saunshi et al. 2025, arXiv:2502.17416,
    section 3.
    """
    if length < 3:
        raise ValueError(f"--length {length}: a sequence needs two letters; take 3 or more")

    def draw(numbers: np.random.Generator, count: int):
        tokens = np.empty((count, length), np.int64)
        answers, depth = np.full_like(tokens, IGNORED), np.full_like(tokens, -1)
        for row in range(count):
            for _ in range(TRIES):  # until there is an answer
                letters = hops + numbers.integers(states, size=length - 1)
                tokens[row] = x = np.append(numbers.integers(hops), letters)
                if at := _hopped(x):
                    answers[row, -1], depth[row, -1] = x[at], x[0] + 1
                    break
        return tokens, answers, depth

    return Task(string.digits[1 : hops + 1] + LETTERS[:states], length, draw)


def addition(operands: int = 4, digits: int = 3) -> Task:
    """Return the task of adding two to `operands` numbers: 123+045+...=, and the sum.

    The sum is written with its lowest digit first. The answers are the digits of the sum, each at
    the
    token before it. Hops are the number of operands.

    operands: largest number of operands
    digits: digits of an operand
    """
    alphabet = "+0123456789=_"
    of = {c: i for i, c in enumerate(alphabet)}
    total = len(str(operands * (10**digits - 1)))
    length = operands * (digits + 1) + total

    def draw(numbers: np.random.Generator, count: int):
        tokens = np.full((count, length), of["_"])
        answers, hops = np.full_like(tokens, IGNORED), np.full_like(tokens, -1)
        for row in range(count):
            terms = numbers.integers(10**digits, size=numbers.integers(2, operands + 1))
            asked = "+".join(f"{n:0{digits}d}" for n in terms) + "="
            answer = f"{terms.sum():0{total}d}"[::-1]
            ids = [of[c] for c in asked + answer]
            tokens[row, : len(ids) - 1] = ids[:-1]
            span = slice(len(asked) - 1, len(ids) - 1)
            answers[row, span], hops[row, span] = ids[len(asked) :], len(terms)
        return tokens, answers, hops

    return Task(alphabet, length, draw)


TASKS = {"register": register, "registers": registers, "hop": hop, "addition": addition}
RANGES = {
    "states": (2, 8), "operations": (1, 52), "length": (2, 1 << 20), "registers": (1, 10),
    "hops": (1, 9), "operands": (2, 99), "digits": (1, 9), "train": (1, 1 << 30),
    "val": (1, 1 << 30), "seed": (0, (1 << 63) - 1),
}  # fmt: skip
PARTS = {"train": 0, "val": 1, "test": 2}


def sequences(task: Task, part: str, count: int, seed: int = 0):
    """Return tokens, targets and hops of sequences, (count, T) int64 each.

    task: the task
    part: "train", "val" or "test"
    count: number of sequences
    seed: random seed
    """
    return task.draw(np.random.default_rng([seed, PARTS[part]]), count)


def main(argv: list[str]) -> None:
    """Make the corpus that the command line describes."""
    from minillm.data.labelled import write_sequences
    from minillm.errors import UsageError
    from minillm.runtime import cli

    p = cli.Parser(prog="tasks.py", description=__doc__.split("\n")[0])
    p.add_argument("task", choices=tuple(TASKS))
    p.add_argument("--out", type=cli.path, required=True, help="folder for the prepared corpus")
    for name, words in {
        "states": "number of values of a register, or of letters of hop",
        "operations": "number of permutations",
        "length": "number of tokens of a sequence",
        "registers": "number of registers of the task registers",
        "hops": "largest number of hops of hop",
        "operands": "largest number of operands of addition",
        "digits": "number of digits of an operand",
    }.items():  # fmt: skip
        p.add_argument(f"--{name}", type=cli.whole(*RANGES[name]), help=words)
    p.add_argument("--train", type=cli.whole(*RANGES["train"]), default=40_000,
                   help="number of training sequences")  # fmt: skip
    p.add_argument("--val", type=cli.whole(*RANGES["val"]), default=1024,
                   help="number of validation sequences")  # fmt: skip
    p.add_argument("--seed", type=cli.whole(*RANGES["seed"]), default=0,
                   help="random seed")  # fmt: skip
    args = p.parse(argv)
    make = TASKS[args.task]
    own = [name for name in inspect.signature(make).parameters if name in RANGES]
    given = {n: v for n, v in vars(args).items() if n in RANGES and v is not None}
    sizes = {n: v for n, v in given.items() if n not in ("train", "val", "seed")}
    for name in sizes:
        if name not in own:
            flags = ", ".join(f"--{n}" for n in own)
            raise UsageError(f"--{name} is not a flag of the task {args.task}, which has {flags}")
    try:
        task = make(**sizes)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for part in ("train", "val"):
        if given[part] * task.length > MOST:
            raise UsageError(
                f"--{part} {given[part]}: at most {MOST // task.length} sequences of {task.length} "
                "tokens can be made at once; take fewer"
            )
    splits = {part: sequences(task, part, given[part], args.seed)[:2] for part in ("train", "val")}
    settings = {n: str(v) for n, v in {"task": args.task, **given}.items()}
    corpus = write_sequences(args.out, task.alphabet, splits, f"task {args.task}", settings)
    print(f"{corpus.folder}: {args.train} + {args.val} sequences of {corpus.sequence} tokens, "
          f"vocabulary {corpus.vocab_size}", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(HOME))  # so that a checkout works without an installation
    from minillm.runtime import program

    sys.exit(program.run("tasks.py", main, sys.argv[1:]))
