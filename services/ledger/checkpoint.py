"""What a seal's signature is of: a checkpoint, the form in which transparency logs publish their heads.

    chatrail/usage
    20852163
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

    — chatrail/usage Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=

Origin, tree size and root hash, each with its line's end, are what Ed25519 signs; the signature's line carries four
bytes that tell the key, then the signature (c2sp.org/tlog-checkpoint, c2sp.org/signed-note).
"""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from services.ledger.merkle import Head
from services.ledger.verify_record import ORIGIN, checkpoint_text, key_id
from shared.errors import Misconfigured

_PEM = re.compile(rb"-----BEGIN ([A-Z ]+)-----.*?-----END \1-----", re.DOTALL)


class Signature(NamedTuple):
    """By the key whose id this is, eight hex digits."""

    key_id: str
    signature: bytes


class Keys:
    """The key that signs, if there is one, and all that are believed, by their ids."""

    def __init__(self, signing: Ed25519PrivateKey | None, believed: Mapping[str, Ed25519PublicKey]) -> None:
        self.signing = signing
        self._believed = believed

    @property
    def key_id(self) -> str | None:
        """Of the key that signs."""
        return key_id(self.signing.public_key().public_bytes_raw()) if self.signing else None

    @property
    def believed_ids(self) -> list[str]:
        return sorted(self._believed)

    def __bool__(self) -> bool:
        return bool(self._believed)

    def sign(self, head: Head) -> Signature | None:
        return self.sign_bytes(checkpoint_text(head.size, head.root).encode())

    def sign_bytes(self, text: bytes) -> Signature | None:
        if self.signing is None or self.key_id is None:
            return None
        return Signature(self.key_id, self.signing.sign(text))

    def is_right(self, head: Head, signature: Signature) -> bool:
        """Whether a believed key made it, of this head."""
        return self.is_right_of(checkpoint_text(head.size, head.root).encode(), signature)

    def is_right_of(self, text: bytes, signature: Signature) -> bool:
        """Whether a believed key made it, of this text."""
        key = self._believed.get(signature.key_id)
        if key is None:
            return False
        try:
            key.verify(signature.signature, text)
        except InvalidSignature:
            return False
        return True


def checkpoint(head: Head, signature: Signature | None) -> str:
    """The note that is published: text, and line of the signature."""
    text = checkpoint_text(head.size, head.root)
    if signature is None:
        return text
    told = base64.b64encode(bytes.fromhex(signature.key_id) + signature.signature).decode()
    return f"{text}\n— {ORIGIN} {told}\n"


def load_keys(path: Path | None) -> Keys:
    """From a PEM file: the first private key signs, all are believed, public keys of earlier times included.

    Raises Misconfigured, without a word of the content, when it is something else.
    """
    if path is None:
        return Keys(None, {})
    signing: Ed25519PrivateKey | None = None
    believed: dict[str, Ed25519PublicKey] = {}
    for block in _blocks(path):
        private, public = _read_key(path, block)
        signing = signing or private
        believed[key_id(public.public_bytes_raw())] = public
    return Keys(signing, believed)


def signing_keys(path: Path | None) -> Keys:
    """As `load_keys`; a file that holds no private key is refused, too."""
    keys = load_keys(path)
    if path and keys.signing is None:
        raise Misconfigured(f"CHATRAIL_SEAL_KEY_FILE {path} holds no private key to seal with.")
    return keys


def _blocks(path: Path) -> list[bytes]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Misconfigured(f"CHATRAIL_SEAL_KEY_FILE {path} cannot be read: {error.strerror}.") from None
    blocks = [found.group() for found in _PEM.finditer(content)]
    if not blocks:
        raise Misconfigured(
            f"CHATRAIL_SEAL_KEY_FILE {path} holds no key in PEM. "
            f"Make one: openssl genpkey -algorithm ed25519 -out {path}"
        )
    return blocks


def _read_key(path: Path, block: bytes) -> tuple[Ed25519PrivateKey | None, Ed25519PublicKey]:
    try:
        private = load_pem_private_key(block, None) if b"PRIVATE KEY" in block else None
        public = private.public_key() if private else load_pem_public_key(block)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private = public = None
    if not isinstance(public, Ed25519PublicKey):
        raise Misconfigured(
            f"CHATRAIL_SEAL_KEY_FILE {path} holds something else than unencrypted Ed25519 keys in PEM."
        ) from None
    return private if isinstance(private, Ed25519PrivateKey) else None, public
