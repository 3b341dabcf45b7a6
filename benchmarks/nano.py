"""Compare the default run with gzip and xz on its held-out text, and examine 20 samples.

    python benchmarks/nano.py runs/nano-1

gzip and xz compress the concatenation of the held-out files, the same bytes over which train.py
counts bits per byte. A sampled line is accepted if Python's tokenizer, given that line alone, finds
no error in it (brackets and triple quotes may stay open). It is a copy if the same line, apart from
white space around it, is in the training text.
"""

import io
import subprocess
import sys
import tokenize
from pathlib import Path

from minillm.checkpoint.find import load_run
from minillm.checkpoint.run_folder import RunFolder
from minillm.config.sampling import SamplingParams
from minillm.data.batches import Tokens
from minillm.data.shards import Corpus, open_corpus
from minillm.inference.complete import complete

SAMPLES, TOKENS = 20, 200


def raw_text(corpus: Corpus, split: str) -> bytes:
    """Return the bytes of all documents of a split, one after the other.

    corpus: the prepared corpus
    split: "train" or "val"
    """
    tokens = Tokens(corpus, split)
    return corpus.tokenizer().decode_bytes(tokens.read(0, len(tokens)).tolist())


def bits_per_byte(command: list[str], data: bytes) -> float:
    """Return the bits per byte of a compressor.

    command: the compressor's command line
    data: the text
    """
    return 8 * len(subprocess.run(command, input=data, capture_output=True).stdout) / len(data)


def is_accepted(line: str) -> bool:
    """Return whether Python's tokenizer finds no error in the line."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline))
    except (tokenize.TokenError, SyntaxError) as error:
        return "EOF in multi-line" in str(error) or "unexpected EOF" in str(error)
    return all(token.type != tokenize.ERRORTOKEN for token in tokens)


def main(run: Path) -> None:
    """Print the table."""
    corpus = open_corpus(RunFolder(run).corpus())
    held_out = raw_text(corpus, "val")
    print(f"held out: {corpus.documents['val']} files, {len(held_out):,} bytes")
    assert len(held_out) == corpus.bytes["val"]
    for command in (["gzip", "-9", "-c"], ["xz", "-9e", "-c"]):
        print(f"{' '.join(command[:2])}: {bits_per_byte(command, held_out):.4f} bits a byte")
    model, tokenizer, _ = load_run(run)
    samples = complete(model, tokenizer, [""] * SAMPLES, SamplingParams(max_tokens=TOKENS))
    known = {line.strip() for line in raw_text(corpus, "train").decode().splitlines()}
    # The last line of a sample that ran out of tokens is cut off in the middle.
    lines = [
        line
        for s in samples
        for line in s.text.splitlines()[: -1 if s.finish == "length" else None]
        if line.strip()
    ]
    accepted = sum(map(is_accepted, lines))
    new = sum(line.strip() not in known for line in lines)
    print(f"{SAMPLES} samples of up to {TOKENS} tokens, seed 0: {len(lines)} non-blank lines")
    print(f"accepted by Python's tokenizer: {accepted}; not copies of training lines: {new}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
