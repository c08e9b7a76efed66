"""The look-ups in PTX, which no interpreter runs, executed here instruction by instruction."""

import re

import numpy as np
import ptx
import pytest

from tqcore.kernels import lookup
from tqcore.packing import HIGH_BITS, pack, packed_dim, unpack

TABLE = np.array([-128, 127, -1, 0, 1, 2, 3, 5, -7, 11, 64, -65, 100, -101, 33, -34], np.int8)
RNG = np.random.default_rng(0)


# --- the few instructions of PTX, on arrays of uint32 ----------------------------------------------------------

INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "mul.lo.u32": np.multiply,
    "add.u32": np.add,
    "and.b32": np.bitwise_and,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "lop3.b32": ptx.lop3,
    "prmt.b32": ptx.prmt,
}


def execute(text, results, *operands):
    """Arrays of int8 from arrays of bytes or of int32, [n, 4]: what `inline_asm_elementwise` does with pack=4."""
    registers = {}
    for operand in operands:
        for register in [operand.view(np.uint32)[:, 0]] if operand.itemsize == 1 else operand.view(np.uint32).T:
            registers[f"${results + len(registers)}"] = register
    size = len(operands[0])
    for line in text.strip("{}\n ").split(";"):
        if not line.strip() or line.split()[0] == ".reg":
            continue
        name, rest = line.split(None, 1)
        to, *sources = re.split(r",\s*", rest.strip())
        values = [
            registers[x] if x in registers else np.full(size, int(x, 0), np.uint32)  # a name not yet set: ValueError
            for x in sources
        ]
        registers[to] = INSTRUCTIONS[name](*values)
    return [registers[f"${i}"].view(np.int8).reshape(-1, 4) for i in range(results)]


def coordinates(bits):
    """Random indices [n, 4, fields], and the operands of bytes that hold them."""
    indices = RNG.integers(0, 2**bits, (4096, 8 if bits == 4 else 32), dtype=np.uint8)
    packed = pack(indices, np, bits)
    codes = packed if bits != 3 else np.ascontiguousarray(packed[:, :8])
    count = codes.shape[1]
    operands = [codes.reshape(-1, 4)]
    if bits == 3:
        plane = packed[:, 8:].reshape(-1, 4)
        (shifted,) = execute(lookup.SHIFT, 1, np.ascontiguousarray(plane))
        operands.append(np.stack([plane, shifted.view(np.uint8)], -1).reshape(-1, 4))
    return indices.reshape(-1, count, lookup.FIELDS[bits]).reshape(-1, 4, lookup.FIELDS[bits]), operands


def given(bits, text, results):
    """(codes [n, 4] of random coordinates, their levels [n, 4, fields], the results of a look-up)."""
    indices, operands = coordinates(bits)
    words = TABLE.view(np.int32)[: lookup.WORDS[bits]]
    operands += [np.full((len(operands[0]), 4), word, np.int32) for word in words]
    return operands[0], TABLE[indices], execute(text, results, *operands)


def wrong(bits, text):
    """What differs from the levels of each field in order."""
    _, levels, fields = given(bits, text, lookup.FIELDS[bits])
    return np.argwhere(np.stack(fields, -1) != levels)


@pytest.mark.parametrize("bits", lookup.BITS)
def test_fields_in_order(bits):
    codes, levels, fields = given(bits, lookup.in_order(bits), lookup.FIELDS[bits])
    assert len(np.unique(codes)) == 256
    np.testing.assert_array_equal(np.stack(fields, -1), levels)
    for field in range(lookup.FIELDS[bits]):
        _, levels, (one,) = given(bits, lookup.of_field(bits, field), 1)
        np.testing.assert_array_equal(one, levels[..., field])


@pytest.mark.parametrize("bits", lookup.BITS)
def test_fields_as_they_come(bits):
    _, levels, words = given(bits, lookup.as_they_come(bits), lookup.FIELDS[bits])
    pairs = [levels[..., ::-1]] if bits == 4 else [levels[..., [2, 0]], levels[..., [3, 1]]]
    expected = [half.reshape(-1, 4) for pair in pairs for half in (pair[:, :2], pair[:, 2:])]
    np.testing.assert_array_equal(np.stack(words), np.stack(expected))


@pytest.mark.parametrize("bits", lookup.BITS)
def test_operands_are_as_many_as_constraints(bits):
    for text, results in ((lookup.in_order(bits), lookup.FIELDS[bits]), (lookup.of_field(bits, 0), 1)):
        named = {int(number) for number in re.findall(r"\$(\d+)", text)}
        constraints = lookup.constraints(bits, results).split(",")
        assert constraints == ["=r"] * results + ["r"] * (1 + (bits == 3) + 4 * lookup.WORDS[bits])
        assert max(named) < len(constraints) and set(range(results)) < named


@pytest.mark.parametrize(
    ("bits", "right", "false"),
    [
        (4, "0x77777777", "0x37777777"),
        (4, "0x7531", "0x6420"),
        (3, "0x44444444", "0x40444444"),
        (3, "shr.u32 bit, high, 1", "shr.u32 bit, high, 2"),
        (2, "0x33333333", "0x33333331"),
        (2, "codes, 2", "codes, 4"),
    ],
)
def test_wrong_look_ups_are_seen(bits, right, false):
    text = lookup.in_order(bits)
    assert right in text and len(wrong(bits, text)) == 0
    assert len(wrong(bits, text.replace(right, false))) > 0


def halves(bits, changed=lambda text: text):
    """Levels of random coordinates [n, 4, fields], and what the look-up of float16 makes of them, times 2^24."""
    positive = np.array([6, 18, 30, 43, 57, 73, 93, 127], np.int8)
    indices, operands = coordinates(bits)
    half = 2**bits // 2
    levels = np.append(-positive[:half][::-1], positive[:half])[indices]
    nibbles = operands if bits == 4 else [execute(changed(text), 1, *operands)[0] for text in lookup.NIBBLES[bits]]
    magnitudes = positive if bits == 4 else np.append(positive[:4][::-1], positive[:4])
    words = [np.full((len(indices), 4), word, np.int32) for word in magnitudes.view(np.int32)]
    found = [
        np.stack(execute(changed(text), 2, np.ascontiguousarray(codes), *words), 1).reshape(-1, 8).view(np.float16)
        for codes in nibbles
        for text in lookup.HALVES[bits]
    ]
    return levels, np.stack(found, -1).astype(np.float32) * 2.0**24


@pytest.mark.parametrize("bits", lookup.BITS)
def test_halves(bits):
    levels, found = halves(bits)
    assert len(np.unique(levels)) == 2**bits
    np.testing.assert_array_equal(found, levels)


@pytest.mark.parametrize(
    ("bits", "right", "false"),
    [
        (4, "pick, pick, 7", "pick, pick, 3"),
        (4, "0x82", "0x28"),
        (4, "0x5341", "0x4341"),
        (3, "odd, 4", "odd, 8"),
        (3, "$2, 5", "$2, 4"),
        (2, "0x22222222", "0x22222223"),
        (2, "0xE4", "0xCA"),
    ],
)
def test_wrong_halves_are_seen(bits, right, false):
    texts = *lookup.HALVES[bits], *lookup.NIBBLES.get(bits, ())
    assert any(right in text for text in texts)
    levels, found = halves(bits, lambda text: text.replace(right, false))
    assert np.any(found != levels)


@pytest.mark.parametrize("bits", lookup.NIBBLES)
def test_operands_of_nibbles_are_as_many_as_constraints(bits):
    for text, constraints in (
        *((text, lookup.NIBBLES_CONSTRAINTS[bits]) for text in lookup.NIBBLES[bits]),
        *((text, lookup.HALVES_CONSTRAINTS) for text in lookup.HALVES[bits]),
    ):
        assert max(int(number) for number in re.findall(r"\$(\d+)", text)) < len(constraints.split(","))


def test_registers_are_named():
    """A look-up that reads what it has not set fails."""
    with pytest.raises(ValueError, match="invalid literal"):
        given(2, lookup.in_order(2).replace("mov.b32 w1, w0;", ""), 4)


def test_instructions():
    """Of the emulator, by hand."""
    a, b = (np.array([x], np.uint32) for x in (0x83020100, 0x07060504))
    assert ptx.prmt(a, b, np.array([0x7531], np.uint32)) == 0x07058301
    assert ptx.prmt(a, b, np.array([0xFBC8], np.uint32)) == 0x00FF0000
    assert ptx.lop3(a, b, np.array([0x100], np.uint32), np.array([0xEA])) == (a & b) | 0x100


# --- the operands of the Gluon kernels, which interpreters do not run either -----------------------------------


class Tensor:
    """Of Gluon's methods those that its operands are made with, on a NumPy array; layouts rename registers alone."""

    def __init__(self, array):
        self.array = array
        self.shape, self.type = list(array.shape), self
        self.layout = None

    def reshape(self, shape):
        return Tensor(self.array.reshape(shape))

    def permute(self, order):
        return Tensor(self.array.transpose(order))

    def to(self, dtype):
        return Tensor(self.array.astype(dtype))

    def __add__(self, other):
        return Tensor(self.array + getattr(other, "array", other))

    def __sub__(self, other):
        return Tensor(self.array - getattr(other, "array", other))

    def __rmul__(self, other):
        return Tensor(other * self.array)

    def __rshift__(self, other):
        return Tensor(self.array >> other)


class Language:
    """gl, as far as these functions use it; words of four bytes lie along the last axis, as the layouts say."""

    constexpr, int8, uint8 = object, np.int8, np.uint8

    @staticmethod
    def join(a, b):
        return Tensor(np.stack([a.array, b.array], -1))

    @staticmethod
    def split(a):
        return Tensor(a.array[..., 0]), Tensor(a.array[..., 1])

    @staticmethod
    def convert_layout(x, layout, assert_trivial):
        assert assert_trivial
        return x

    @staticmethod
    def inline_asm_elementwise(text, constraints, operands, dtype, is_pure, pack):
        assert is_pure and pack == 4
        shape, tensors = operands[0].shape, [x for x in operands if isinstance(x, Tensor)]
        words = [np.full((np.prod(shape) // 4, 4), x, np.int32) for x in operands[len(tensors) :]]
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        given = [np.ascontiguousarray(x.array).reshape(-1, 4) for x in tensors]
        found = execute(text.value, len(dtypes), *given, *words)
        assert len(constraints.value.split(",")) == len(dtypes) + len(given) + 4 * len(words)
        results = tuple(Tensor(x.view(kind).reshape(shape)) for x, kind in zip(found, dtypes, strict=True))
        return results if isinstance(dtype, tuple) else results[0]


@pytest.fixture
def gluon(monkeypatch):
    """The module of the Gluon kernels, its functions plain Python on NumPy arrays."""
    from tqcore.kernels import gluon_scores

    for name in ("_levels", "_in_turn", "_query_operands", "_key_operand", "_sums"):
        monkeypatch.setattr(gluon_scores, name, getattr(gluon_scores, name).fn)
    monkeypatch.setattr(gluon_scores, "gl", Language)
    return gluon_scores


@pytest.mark.parametrize("order", ["as it is", "with two coordinates exchanged"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("bits", lookup.BITS)
def test_gluon_operands_match(gluon, bits, head_dim, order):
    """⟨level, hi⟩ and ⟨level, lo⟩ of eight rows and sixteen keys from the operands of two products of matrices."""
    indices = RNG.integers(0, 2**bits, (16, head_dim), dtype=np.uint8)
    packed = pack(indices, np, bits)
    assert packed.shape[1] == packed_dim(head_dim, bits) and (unpack(packed, np, bits) == indices).all()
    low = head_dim // 4 if bits == 3 else packed.shape[1]
    n = RNG.integers(-16319, 16320, (8, head_dim))
    given_n = n.copy()
    if order != "as it is":
        given_n[:, [3, 5]] = given_n[:, [5, 3]]
    words = TABLE.view(np.int32)
    levels = gluon._levels(Tensor(packed[:, :low]), Tensor(packed[:, low:]), words, bits)
    queries = gluon._query_operands(Tensor(given_n), 8, head_dim // 2, bits, None)
    operands = [gluon._key_operand(x, 16, head_dim // 2, None).array.astype(np.int64) for x in levels]
    sums = sum(q.array.astype(np.int64) @ k for q, k in zip(queries, operands, strict=True))
    hi, lo = (x.array for x in gluon._sums(Tensor(sums), 8, 16))
    expected = n @ TABLE[indices].astype(np.int64).T
    assert ((128 * hi + lo) == expected).all() == (order == "as it is")


def test_order_of_the_high_plane():
    """A nibble of the high plane serves the same nibbles of two bytes of the low plane: what `_OF_3` relies on."""
    fields = np.array(HIGH_BITS).reshape(2, 2, 2)  # nibble, byte, field of the nibble
    np.testing.assert_array_equal(fields // 4, [[[0, 0], [1, 1]]] * 2)
    np.testing.assert_array_equal(fields % 4 // 2, [[[0, 0], [0, 0]], [[1, 1], [1, 1]]])
