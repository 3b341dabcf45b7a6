"""Experiment 5 of recurrent depth: self-speculative against plain decoding of the same text.

    python benchmarks/recurrence/speculation.py RUN [--recurrence R ...] [--device D] [--dtype T]

Batch 1, greedy and sampled. Rounds of plain and speculative decoding alternate, and the results are
medians of their ratios. In fp32 the tokens must be the same. In other dtypes the texts that differ
by rounding are counted. Writes speculation.md into this folder, or with another device or dtype
speculation-DEVICE-DTYPE.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from minillm.checkpoint.find import load_run
from minillm.config.sampling import SamplingParams
from minillm.inference.decoding_batch import Token
from minillm.inference.generate import generate
from minillm.inference.speculative import Tally, speculate
from minillm.runtime.device import DTYPES, pick_device, synchronize

PROMPTS = ("def ", "import ", "class ", "    return ", '"""')
TOKENS, ROUNDS = 100, 5


def main() -> None:
    """Time all combinations and write the table."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("run", type=Path)
    p.add_argument("--recurrence", type=int, nargs="+", default=[4, 8, 16])
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    p.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    p.add_argument("--out", type=Path, default=HERE, help="folder for the table")
    args = p.parse_args()
    torch.set_num_threads(1)
    device = pick_device(args.device)
    model, tokenizer, _ = load_run(args.run, device=device, dtype=DTYPES[args.dtype])
    lines = ["| temperature | verified at | drafted at | lookahead | accepted | plain tokens/s "
             "| times as fast | texts that differ |",
             "|--:|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for temperature in (0.0, 0.8):
        for r in args.recurrence:
            for few, ahead in ((1, 2), (1, 4), (2, 4)):
                ratios, speeds, tally, others = [], [], Tally(), 0
                for number in range(ROUNDS):
                    ids = tokenizer.prompt_ids(PROMPTS[number])
                    params = SamplingParams(max_tokens=TOKENS, temperature=temperature, top_p=1.0,
                                            seed=number, recurrence=r)  # fmt: skip
                    plain, plain_s = timed(generate(model, [ids], params), device)
                    drafting = replace(params, draft_recurrence=few)
                    drafted = speculate(model, [ids], drafting, lookahead=ahead, tally=tally)
                    ours, ours_s = timed(drafted, device)
                    if args.dtype == "fp32":
                        assert ours == plain, "speculation changed the text"
                    others += ours != plain
                    ratios.append(plain_s / ours_s)
                    speeds.append(len(plain) / plain_s)
                share = tally.accepted / tally.drafted
                speed, ratio = statistics.median(speeds), statistics.median(ratios)
                told = f"{100 * share:.0f} % | {speed:.0f} | {ratio:.2f} | {others} of {ROUNDS} |"
                lines.append(f"| {temperature:g} | {r} | {few} | {ahead} | {told}")
                print(lines[-1], flush=True)
    usual = device.type == "cpu" and args.dtype == "fp32"
    name = "speculation" if usual else f"speculation-{device.type}-{args.dtype}"
    (args.out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def timed(tokens: Iterator[Token], device: torch.device) -> tuple[list[int], float]:
    """Return the ids of some tokens, and the seconds that it took to generate them.

    tokens: generator of the tokens
    device: the device
    """
    synchronize(device)
    start = time.perf_counter()
    ids = [token.id for token in tokens]
    synchronize(device)
    return ids, time.perf_counter() - start


if __name__ == "__main__":
    main()
