"""What runs in the ranks of test_sharded_checkpoint.py: python checkpoint_ranks.py RUN.

Two real processes save, read, meet damage and a full disk; what each found is printed as JSON.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch

from minillm.checkpoint import find, write
from minillm.checkpoint.run_folder import RunFolder
from minillm.checkpoint.sharded_safetensors import key_of
from minillm.distributed.ranks import Ranks, connect
from minillm.runtime.launch import launched

N = 1001  # elements of "w", cut at 400


def own(ranks: Ranks, plus: float = 0.0) -> dict:
    """The tensors of this rank."""
    w = torch.arange(N).float() + plus
    start, stop = ((0, 400), (400, N))[ranks.rank]
    return {
        "model": {key_of("w", start, stop): w[start:stop]},
        "optimizer": {
            key_of("exp_avg.w", start, stop): -w[start:stop],
            "step.w": torch.tensor(3.0),
        },
    }


def failure(work) -> list[str]:
    """What work() raises: class and text."""
    try:
        work()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def main(run: Path) -> None:
    """Save whole; save on a full disk; open damaged; save while the other is killed."""
    ranks = connect(launched(), torch.device("cpu"), 60)
    state, found = {"shapes": {"w": [7, 143]}}, {}
    write.save(run, 1, own(ranks), state, ranks)
    past = find.open_checkpoint(run, ranks=ranks)
    expected = torch.arange(N).float()
    start, stop = ((300, N), (0, 500))[ranks.rank]
    found["model"] = torch.equal(past.read("model", "w", start, stop), expected[start:stop])
    found["state"] = torch.equal(past.piece("exp_avg", "w", start, stop), -expected[start:stop])
    found["step"] = float(past.piece("step", "w", 0, 1))

    if ranks.rank == 1:  # the system itself refuses to write more than so many bytes to a file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    found["full"] = failure(lambda: write.save(run, 2, own(ranks), state, ranks))
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    ranks.wait()
    found["after a full disk"] = sorted(p.name for p in (run / "checkpoints").iterdir())

    path = run / "checkpoints" / "step-00000001" / "optimizer-00002-of-00002.safetensors"
    if ranks.rank == 1:
        data = bytearray(path.read_bytes())
        data[-7] ^= 4
        path.write_bytes(data)
    ranks.wait()
    found["damaged"] = failure(lambda: find.open_checkpoint(run, ranks=ranks))
    write.save(run, 1, own(ranks, plus=1.0), state, ranks)
    found["again"] = float(find.open_checkpoint(run, "1", ranks).read("model", "w", 0, 1))

    # A newer one is damaged where rank 1 alone looks: both take the older.
    write.save(run, 2, own(ranks), state, ranks)
    path = run / "checkpoints" / "step-00000002" / "model-00002-of-00002.safetensors"
    if ranks.rank == 1:
        os.truncate(path, 100)
    ranks.wait()
    found["passed over"] = find.open_checkpoint(run, ranks=ranks).step
    found["asked for"] = failure(lambda: find.open_checkpoint(run, "2", ranks))
    ranks.wait()
    if ranks.rank == 0:
        write.set_aside(run, 1)
    ranks.wait()
    print(json.dumps(found), flush=True)

    # Rank 1 dies when it should write: nothing that looks whole may come of it.
    if ranks.rank == 1:
        os._exit(0)
    killed = failure(lambda: write.save(run, 3, own(ranks), state, ranks))
    print(
        json.dumps({"failed": bool(killed), "left": sorted(RunFolder(run).checkpoints())}),
        flush=True,
    )
    os._exit(0)  # there is nobody to take leave of


if __name__ == "__main__":
    main(Path(sys.argv[1]))
