"""Check that records are in the ledger as they were sealed. Needs nothing but this file and Python 3.

    python3 verify_record.py proof.json [--key public.pem] [--seals seals.txt]

The proof holds records as they came in on the stream, the place of each among all, the subtrees' roots that lead from
it to the root of the tree (RFC 9162, section 2.1.3), and the checkpoint whose root this must be. A checkpoint that
only the proof tells of proves little: hold it against the operator's public key, the file of all checkpoints that the
operator publishes, or what somebody else was given.

Ends with 0 when all is as it was sealed, 1 when something is not, 2 when something could not be checked here.
"""

import argparse
import base64
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

ORIGIN = "chatrail/usage"
FORMAT = "chatrail-proof/1"
# What precedes the 32 bytes of an Ed25519 public key in PEM (RFC 8410).
_ED25519 = bytes.fromhex("302a300506032b6570032100")
# The id of a key, and its signature.
_SIGNED = 4 + 64


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


class Checkpoint(NamedTuple):
    """A sealed head, and by the ids of keys (eight hex digits) the signatures of its text under our name."""

    tree_size: int
    root_hash: bytes
    signatures: tuple[tuple[str, bytes], ...] = ()

    @property
    def text(self) -> str:
        return checkpoint_text(self.tree_size, self.root_hash)


def checkpoint_text(tree_size: int, root_hash: bytes) -> str:
    """What is signed (c2sp.org/tlog-checkpoint)."""
    return f"{ORIGIN}\n{tree_size}\n{base64.b64encode(root_hash).decode()}\n"


def key_id(public_key: bytes, name: str = ORIGIN) -> str:
    """Of an Ed25519 key, as c2sp.org/signed-note tells keys apart."""
    return hashlib.sha256(name.encode() + b"\n\x01" + public_key).digest()[:4].hex()


def read_checkpoint(note: str) -> Checkpoint:
    """Raises ValueError when it is none of ours."""
    text, _, below = note.partition("\n\n")
    lines = text.rstrip("\n").split("\n")
    if len(lines) != 3 or lines[0] != ORIGIN:
        raise ValueError("this is no checkpoint of ours")
    size, root = int(lines[1]), base64.b64decode(lines[2], validate=True)
    signatures = [made for name, made in map(_read_signature, below.splitlines()) if name == ORIGIN]
    found = Checkpoint(size, root, tuple((made[:4].hex(), made[4:]) for made in signatures))
    is_whole = len(root) == hashlib.sha256().digest_size and all(len(made) == _SIGNED for made in signatures)
    if text.rstrip("\n") + "\n" != found.text or not is_whole:
        raise ValueError("this is no checkpoint of ours")
    return found


def _read_signature(line: str) -> tuple[str, bytes]:
    """Whose it is, and what was made: others may have signed the note, too, each in a way of their own."""
    dash, name, made = line.split(" ")
    if dash != "\N{EM DASH}":
        raise ValueError("this is no line of a signature")
    return name, base64.b64decode(made, validate=True)


def notes_in(lines: Iterable[str]) -> Iterator[str]:
    """The checkpoints of a file of many, with empty lines between them, each with the lines of its signatures."""
    text, signatures = "", ""
    for paragraph in _paragraphs(lines):
        # One that was cut off has only a part of the first line.
        if text and not ORIGIN.startswith(paragraph.partition("\n")[0]):
            signatures += f"\n{paragraph}"
            continue
        if text:
            yield text + signatures
        text, signatures = paragraph, ""
    if text:
        yield text + signatures


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph = ""
    for line in chain(lines, "\n"):
        if line != "\n":
            paragraph += line
        elif paragraph:
            yield paragraph
            paragraph = ""


def public_key_in(pem: str) -> bytes:
    """The 32 bytes of it. Raises ValueError when it is no Ed25519 public key in PEM."""
    inside = pem.partition("-----BEGIN PUBLIC KEY-----")[2].partition("-----END PUBLIC KEY-----")[0]
    key = base64.b64decode("".join(inside.split()), validate=True)
    if len(key) != len(_ED25519) + 32 or not key.startswith(_ED25519):
        raise ValueError("this is no Ed25519 public key in PEM")
    return key[len(_ED25519) :]


class Unproven(Exception):
    """Something is not as it was sealed."""


def check_records(proof: dict[str, Any], checkpoint: Checkpoint) -> list[str]:
    """What is proven, a line a record. Raises Unproven."""
    told = []
    if not proof["records"]:
        raise Unproven("it has no records")
    if len({record["leafIndex"] for record in proof["records"]}) < len(proof["records"]):
        raise Unproven("it has a record more than once")
    for record in proof["records"]:
        index, entry = record["leafIndex"], record["record"].encode()
        path = [bytes.fromhex(step) for step in record["path"]]
        if not verify_inclusion(leaf_hash(entry), index, checkpoint.tree_size, path, checkpoint.root_hash):
            raise Unproven(f"record {index} IS NOT what was sealed: it, its place or the proof has been changed")
        event = json.loads(entry)
        if event["subject"] != proof["userId"]:
            raise Unproven(f"record {index} is another user's")
        used = event["data"].get("tokens_used")
        told.append(f"record {index}: {event['type']} {event['id']}" + ("" if used is None else f", {used} tokens"))
    return told


def check_listed(checkpoint: Checkpoint, seals: Iterable[str]) -> None:
    """Raises Unproven unless the file of checkpoints has this one, and no other of its size.

    What is none in it, such as a line that a crash cut off, says nothing of any.
    """
    known = (found for note in notes_in(seals) if (found := _as_checkpoint(note)))
    roots = {each.root_hash for each in known if each.tree_size == checkpoint.tree_size}
    if roots != {checkpoint.root_hash}:
        raise Unproven("the checkpoint IS NOT the one of this size that the file of checkpoints has")


def _as_checkpoint(note: str) -> Checkpoint | None:
    try:
        return read_checkpoint(note)
    except ValueError:
        return None


def check_signature(checkpoint: Checkpoint, key_file: str) -> str | None:
    """Raises Unproven unless the key has signed it. Without the package `cryptography`: how to find out."""
    with open(key_file, encoding="utf-8") as file:
        pem = file.read()
    signature = dict(checkpoint.signatures).get(key_id(public_key_in(pem)))
    if signature is None:
        raise Unproven("the checkpoint IS NOT signed by this key")
    try:
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - where it is installed
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
    except ImportError:
        text, made = (base64.b64encode(part).decode() for part in (checkpoint.text.encode(), signature))
        return (
            f"echo {text} | base64 -d > checkpoint.bin; echo {made} | base64 -d > signature.bin\n"
            f"openssl pkeyutl -verify -pubin -inkey {shlex.quote(key_file)}"
            " -rawin -in checkpoint.bin -sigfile signature.bin"
        )
    try:
        Ed25519PublicKey.from_public_bytes(public_key_in(pem)).verify(signature, checkpoint.text.encode())
    except InvalidSignature:
        raise Unproven("the checkpoint's signature IS NOT right") from None
    return None


def check(arguments: argparse.Namespace) -> int:
    """The exit status, after all that is proven was said. Raises Unproven."""
    with open(arguments.proof, encoding="utf-8") as file:
        proof = json.load(file)
    if proof["format"] != FORMAT:
        raise ValueError("it has another format")
    checkpoint = read_checkpoint(proof["checkpoint"])
    told = check_records(proof, checkpoint)
    compared, to_do = [], None
    if arguments.seals:
        with open(arguments.seals, encoding="utf-8", errors="replace") as file:
            check_listed(checkpoint, file)
        compared.append("the file of checkpoints has it")
    if arguments.key:
        to_do = check_signature(checkpoint, arguments.key)
        compared += [] if to_do else ["the key has signed it"]
    say(*told, f"{len(told)} records are as they were sealed, under this checkpoint:", "", checkpoint.text)
    if to_do:
        say("The signature could not be checked here, for want of the package cryptography. This does it:", to_do)
    elif compared:
        say(f"The checkpoint is the operator's: {', '.join(compared)}.")
    else:
        say("The checkpoint itself was compared with nothing: name --key or --seals.")
    return 2 if to_do else 0


def say(*lines: str) -> None:
    """Nothing that a terminal would obey: what is not printable is escaped."""
    text = "".join(f"{line}\n" for line in lines)
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    sys.stdout.write("".join(shown))
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proof")
    parser.add_argument("--key", help="the operator's public key, PEM")
    parser.add_argument("--seals", help="the operator's file of checkpoints")
    arguments = parser.parse_args()
    try:
        return checked(arguments)
    except BrokenPipeError:
        # Whoever read along has seen enough: nothing more is written, at the end of the program neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


def checked(arguments: argparse.Namespace) -> int:
    """The exit status, whatever the proof is like."""
    try:
        return check(arguments)
    except Unproven as problem:
        say(f"NOT PROVEN: {problem}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        say(f"NOT PROVEN: this cannot be read as a proof ({type(problem).__name__}: {problem})")
    except BrokenPipeError:
        raise
    except OSError as problem:
        say(f"Not checked: {problem}")
        return 2
    return 1


if __name__ == "__main__":
    sys.exit(main())
