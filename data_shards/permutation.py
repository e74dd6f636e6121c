"""A random order of [0, n) as a pure function of the index: no table, so any position of any epoch is found at once.

A balanced Feistel network over the smallest even number of bits that holds n, walked along its cycle until the value is
below n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

import struct

import xxhash

_ROUNDS = 6
_ALL_BITS = 0xFFFFFFFFFFFFFFFF
_pack_three = struct.Struct("<3Q").pack


def mix(*numbers: int) -> int:
    """Return a 64-bit hash of integers (each taken modulo 2⁶⁴): the one source of every derived seed."""
    packed = struct.pack(f"<{len(numbers)}Q", *(number & _ALL_BITS for number in numbers))
    return xxhash.xxh3_64_intdigest(packed)


def permute(index: int, size: int, key: int) -> int:
    """Return where the key's permutation of [0, size) sends an index.

    Raises
    ------
    ValueError
        If the index does not lie in [0, size).
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside [0, {size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low_bits = (1 << half) - 1
    key &= _ALL_BITS
    while True:
        left, right = index >> half, index & low_bits
        for turn in range(_ROUNDS):
            # mix(key, turn, right), without the detour over any count of numbers
            left, right = right, left ^ (xxhash.xxh3_64_intdigest(_pack_three(key, turn, right)) & low_bits)
        index = (left << half) | right
        if index < size:
            return index
