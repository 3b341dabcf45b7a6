"""One rank of test_recovery_on_ranks.py: train.py, with a loss that is spoilt at some calls.

    mishap_ranks.py RANK CALLS VALUE train.py's flags...

Prints, as JSON, a digest of the weights after every step.
"""

import hashlib
import json
import sys
from functools import partial

from minillm.distributed.ranks import leave
from minillm.model.gpt import GPT
from minillm.runtime import program
from minillm.runtime.launch import launched
from minillm.scripts import train as script
from minillm.training.steps import steps


def main(rank: int, calls: set[int], value: float, flags: list[str]) -> int:
    """The exit code of the training."""
    seen, digests, forward = [], [], GPT.forward

    def spoilt(self, *args, **kwargs):
        loss = forward(self, *args, **kwargs)
        if not self.training:
            return loss
        seen.append(1)
        bad = launched().rank == rank and len(seen) - 1 in calls
        return loss * value if bad else loss

    def watched(setup, state, *args):
        for result in steps(setup, state, *args):
            digest = hashlib.sha256()
            for _, p in sorted(setup.model.named_parameters()):
                p = p.full_tensor() if hasattr(p, "full_tensor") else p
                assert p.isfinite().all()
                digest.update(p.detach().numpy().tobytes())
            digests.append(digest.hexdigest())
            yield result

    GPT.forward = spoilt
    code = program.run("train.py", partial(script.main, steps=watched), flags)
    print(json.dumps(digests), flush=True)
    return code


if __name__ == "__main__":
    calls = {int(n) for n in sys.argv[2].split(",")}
    sys.exit(leave(main(int(sys.argv[1]), calls, float(sys.argv[3]), sys.argv[4:])))
