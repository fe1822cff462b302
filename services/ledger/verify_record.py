"""Check that a record is in the ledger as it was sealed. Needs nothing but this file and Python 3.

    python3 verify_record.py proof.json

The proof holds the record as it came in on the stream, its place, the subtrees' roots that lead from it to the
root of the tree (RFC 9162, section 2.1.3), and the sealed head that this root must equal. Compare the head with one
from somewhere else: with the file of seals that the operator publishes, or with what somebody else was given.
"""

import base64
import hashlib
import json
import sys
from collections.abc import Sequence


def leaf_hash(entry: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """Whether the leaf with this hash has this place in the tree with this root (2.1.3.2)."""
    if not 0 <= index < size:
        return False
    fn, sn, computed = index, size - 1, leaf
    for step in path:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            computed = node_hash(step, computed)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            computed = node_hash(computed, step)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and computed == root


def main() -> int:
    with open(sys.argv[1], "rb") as file:
        proof = json.load(file)
    record, head = base64.b64decode(proof["record"]), proof["head"]
    path = [bytes.fromhex(step) for step in proof["path"]]
    leaf, root = leaf_hash(record), bytes.fromhex(head["rootHash"])
    is_included = verify_inclusion(leaf, proof["leafIndex"], head["treeSize"], path, root)
    sys.stdout.write(record.decode() + "\n")
    sys.stdout.write(
        f"is record {proof['leafIndex']} of the {head['treeSize']} that were sealed at {head['sealedAt']} "
        f"under {head['rootHash']}\n"
        if is_included
        else "IS NOT what was sealed: the record, its place or the proof has been changed\n"
    )
    return 0 if is_included else 1


if __name__ == "__main__":
    sys.exit(main())
