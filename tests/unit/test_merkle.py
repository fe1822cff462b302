"""The Merkle tree, held to RFC 9162's own example and to the vectors that Certificate Transparency's logs share."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.merkle import (
    Frontier,
    Head,
    consistency,
    inclusion,
    leaf_hash,
    roots_of,
    verify_consistency,
    verify_inclusion,
)
from services.ledger.verify_record import node_hash

ENTRIES = [
    bytes.fromhex(entry)
    for entry in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
SIZES = st.integers(1, 70)


def leaves(size: int) -> list[bytes]:
    return [leaf_hash(n.to_bytes(2)) for n in range(size)]


def head(of: list[bytes]) -> Head:
    frontier = Frontier()
    for leaf in of:
        frontier.append(leaf)
    return Head(frontier.size, frontier.root)


def by_definition(of: list[bytes]) -> bytes:
    """MTH, word for word (2.1.1), of hashes of leaves."""
    if not of:
        return hashlib.sha256(b"").digest()
    if len(of) == 1:
        return of[0]
    k = 1
    while 2 * k < len(of):
        k *= 2
    return node_hash(by_definition(of[:k]), by_definition(of[k:]))


@pytest.mark.parametrize("size", range(9))
def test_the_root_is_that_of_the_known_vectors(size: int) -> None:
    assert head([leaf_hash(entry) for entry in ENTRIES[:size]]).root.hex() == ROOTS[size]


@given(SIZES)
def test_the_root_is_the_definitions(size: int) -> None:
    assert head(leaves(size)).root == by_definition(leaves(size))


def test_the_proofs_are_those_of_the_rfcs_example() -> None:
    """2.1.5, a tree of seven, with the RFC's names: a to f and j are leaves, g to i pairs, k and l the two halves."""
    b, c, d, f, j = (range(leaf, leaf + 1) for leaf in (1, 2, 3, 5, 6))
    g, h, i, k, last = range(2), range(2, 4), range(4, 6), range(4), range(4, 7)
    assert inclusion(0, 7) == [b, h, last]
    assert inclusion(3, 7) == [c, g, last]
    assert inclusion(4, 7) == [f, j, k]
    assert inclusion(6, 7) == [i, k]
    assert consistency(3, 7) == [c, d, g, last]
    assert consistency(4, 7) == [last]
    assert consistency(6, 7) == [i, j, k]


@given(SIZES)
def test_the_paths_of_all_leaves_are_found_in_one_pass(size: int) -> None:
    of = leaves(size)
    paths = [inclusion(index, size) for index in range(size)]
    roots = roots_of([subtree for path in paths for subtree in path], of)
    assert roots == [by_definition([of[n] for n in subtree]) for path in paths for subtree in path]


@given(SIZES, st.data())
def test_every_leaf_is_proved_and_nothing_else(size: int, data: st.DataObject) -> None:
    of = leaves(size)
    index = data.draw(st.integers(0, size - 1))
    path, root = roots_of(inclusion(index, size), of), head(of).root
    assert verify_inclusion(of[index], index, size, path, root)
    assert not verify_inclusion(leaf_hash(b"another"), index, size, path, root)
    other = data.draw(st.integers(0, size - 1))
    assert verify_inclusion(of[index], other, size, path, root) == (other == index)
    assert not verify_inclusion(of[index], index, size, [*path, root], root)
    assert not path or not verify_inclusion(of[index], index, size, path[:-1], root)
    assert not verify_inclusion(of[index], index, size, path, leaf_hash(root))


@given(SIZES, st.data())
def test_a_tree_is_proved_to_continue_an_older_one_only_when_it_does(size: int, data: st.DataObject) -> None:
    of = leaves(size)
    older_size = data.draw(st.integers(1, size))
    path = roots_of(consistency(older_size, size), of)
    older, newer = head(of[:older_size]), head(of)
    assert verify_consistency(older, newer, path)
    changed = [leaf_hash(b"another"), *of[1:older_size]]
    assert not verify_consistency(head(changed), newer, path)
    assert not verify_consistency(older, Head(size, leaf_hash(b"another")), path)
    assert older_size == size or not verify_consistency(older, newer, path[:-1])


@given(SIZES, SIZES)
def test_a_frontier_goes_on_where_it_was_left(before: int, after: int) -> None:
    of = leaves(before + after)
    half = Frontier()
    for leaf in of[:before]:
        half.append(leaf)
    whole = Frontier(half.size, half.subtrees)
    for leaf in of[before:]:
        whole.append(leaf)
    assert (whole.size, whole.root) == head(of)


def test_what_is_not_in_the_tree_has_no_proof() -> None:
    with pytest.raises(ValueError, match="has no leaf 3"):
        inclusion(3, 3)
    with pytest.raises(ValueError, match="is not the beginning"):
        consistency(4, 3)
    with pytest.raises(ValueError, match="there are no leaves up to 7"):
        roots_of([range(4, 7)], leaves(4))
