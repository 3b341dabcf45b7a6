"""Read the pieces of a SentencePiece model, ours or one from elsewhere, as bytes."""

import sentencepiece

# SentencePiece writes a space as this character, and cannot tell the two apart.
MARK = "\u2581"


def bytes_of_pieces(pieces: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    """Return the bytes of each piece of a model, by id; control pieces have no bytes."""
    # One call for all ids is fast; a worker loads the tokenizer for each batch it encodes.
    ids = list(range(pieces.vocab_size()))
    table = [p.replace(MARK, " ").encode("utf-8") for p in pieces.id_to_piece(ids)]
    has_bytes = any(map(pieces.is_byte, ids))  # then no text has unknown pieces
    for i in ids:
        if pieces.is_unknown(i) and not has_bytes:
            table[i] = pieces.decode([i]).encode("utf-8")
        elif pieces.is_control(i) or pieces.is_unknown(i):
            table[i] = b""
        elif pieces.is_byte(i):
            table[i] = bytes([int(pieces.id_to_piece(i)[3:5], 16)])
    return table


def drops_space(pieces: sentencepiece.SentencePieceProcessor) -> str:
    """Return which spaces decoding drops at the start of a text: "" (none), "one" or "all"."""
    space = pieces.piece_to_id(MARK)
    if pieces.is_unknown(space):
        return "" if pieces.encode("a", out_type=str)[0][:1] != MARK else "one"
    return {0: "all", 1: "one", 2: ""}[len(pieces.decode([space, space]))]
