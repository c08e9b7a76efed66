"""The look-up of a packed index in a table of int8 levels, as PTX: what Triton, Gluon and Pallas kernels share.

`prmt` picks four bytes of eight by four selectors of three bits, which stand in the nibbles of a register. Codes of 4
bits are selectors as they are, and their highest bit picks one of two halves of the table. Of codes of 2 bits,
codes & 0x33333333 has fields 1 and 3 of each byte as selectors, codes >> 2 & 0x33333333 fields 0 and 2. At 3 bits a
third bit comes from a byte of `high` for each byte of the low plane; the high plane's bytes with one copy in front and
one shifted by two bits behind, in turn, are these bytes (`SHIFT`).

Strings for `inline_asm_elementwise` with pack=4, on operands `codes`, at 3 bits `high`, and WORDS[bits] words of the
table, which come as tensors of int32: four registers each.

Levels are antisymmetric (docs/format.md), so that sign and magnitude give each: as the bytes of a float16 level ·
2^-24, a subnormal which tensor cores take as any other number (`HALVES`). At 4 bits index 8 + k is positive level k,
index 7 - k its negative, and two words hold the positive levels. Indices of fewer bits plus 4 - 2^bits / 2 (`NIBBLES`)
number the bytes of a word of positive levels and, before it, of the same reversed.

Source: byte permutes: PTX ISA, `prmt`, `lop3`.
"""

BITS = (2, 3, 4)  # of codes that the kernels take
WORDS = {2: 1, 3: 2, 4: 4}  # int32 words that hold a table of int8
FIELDS = {2: 4, 3: 4, 4: 2}  # coordinates of a byte of codes, or of the low plane

# front and back hold the levels of two bytes of codes each: field 1 of a byte, then field 0.
_OF_4 = """
and.b32 select, codes, 0x77777777;
shr.u32 pick, codes, 1;
lop3.b32 pick, pick, 0x44444444, 0x32103210, 0xEA;
prmt.b32 a, w0, w1, select;
prmt.b32 b, w2, w3, select;
prmt.b32 front, a, b, pick;
shr.u32 select, select, 16;
shr.u32 pick, pick, 16;
prmt.b32 a, w0, w1, select;
prmt.b32 b, w2, w3, select;
prmt.b32 back, a, b, pick;
"""
# The same of fields 2 and 0 (even_*) and of fields 3 and 1 (odd_*), from selectors even and odd.
_OF_SELECTORS = """
prmt.b32 even_front, w0, w1, even;
shr.u32 even, even, 16;
prmt.b32 even_back, w0, w1, even;
prmt.b32 odd_front, w0, w1, odd;
shr.u32 odd, odd, 16;
prmt.b32 odd_back, w0, w1, odd;
"""
_OF_3 = f"""
shr.u32 even, codes, 2;
shr.u32 bit, high, 1;
and.b32 bit, bit, 0x44444444;
lop3.b32 even, even, 0x33333333, bit, 0xEA;
and.b32 bit, high, 0x44444444;
lop3.b32 odd, codes, 0x33333333, bit, 0xEA;
{_OF_SELECTORS}"""
_OF_2 = f"""
mov.b32 w1, w0;
shr.u32 even, codes, 2;
and.b32 even, even, 0x33333333;
and.b32 odd, codes, 0x33333333;
{_OF_SELECTORS}"""
_BODIES = {2: _OF_2, 3: _OF_3, 4: _OF_4}
_PAIRS = {2: ("even", "odd"), 3: ("even", "odd"), 4: ("",)}
_REGISTERS = (
    "codes, high, w0, w1, w2, w3, select, pick, a, b, even, odd, bit, front, back, "
    "even_front, even_back, odd_front, odd_back"
)

SHIFT = "shl.b32 $0, $1, 2;"  # four bytes, whose two lowest bits `_OF_3` does not look at
SHIFT_CONSTRAINTS = "=r,r"

# Of one nibble of each byte, level · 2^-24 in float16. front and back are the magnitudes of two bytes of codes each: of
# the low nibble, then of the high one.
_MAGNITUDES = """
prmt.b32 front, $3, $7, select;
shr.u32 select, select, 16;
prmt.b32 back, $3, $7, select;
"""
_OF_16 = f"""
.reg .b32 pick, select, sign, front, back;
shr.u32 pick, $2, 3;
and.b32 pick, pick, 0x11111111;
mul.lo.u32 pick, pick, 7;
lop3.b32 select, $2, pick, 0x77777777, 0x82;
{_MAGNITUDES.strip()}
"""
_OF_8 = f"""
.reg .b32 select, sign, front, back;
mov.b32 select, $2;
{_MAGNITUDES.strip()}
"""


def _halves(magnitudes: str, shift: str, selectors: tuple[str, str]) -> str:
    """From the bit with the sign, which a shift makes the highest of its byte."""
    return f"""{{{magnitudes}{shift}
lop3.b32 sign, sign, 0x80808080, 0, 0x0C;
prmt.b32 $0, front, sign, {selectors[0]};
prmt.b32 $1, back, sign, {selectors[1]};
}}"""


_HIGH, _LOW = ("0x5341", "0x7361"), ("0x5240", "0x7260")
_HALVES_OF_8 = (
    _halves(_OF_8, "shl.b32 sign, $2, 1;", _HIGH),
    _halves(_OF_8, "shl.b32 sign, $2, 5;", _LOW),
)
HALVES = {  # of the high nibbles, of the low ones
    4: (_halves(_OF_16, "mov.b32 sign, $2;", _HIGH), _halves(_OF_16, "shl.b32 sign, $2, 4;", _LOW)),
    3: _HALVES_OF_8,
    2: _HALVES_OF_8,
}
HALVES_CONSTRAINTS = ",".join(["=&r"] * 2 + ["r"] * 9)
# Of bytes of codes, at 3 bits of the low plane and of `high`: fields 0 and 1, then fields 2 and 3, as nibbles.
_SELECTORS = """
.reg .b32 even, odd, bit;
shr.u32 even, $1, 2;
shr.u32 bit, $2, 1;
and.b32 bit, bit, 0x44444444;
lop3.b32 even, even, 0x33333333, bit, 0xEA;
and.b32 bit, $2, 0x44444444;
lop3.b32 odd, $1, 0x33333333, bit, 0xEA;
"""
NIBBLES = {
    3: (
        f"""{{{_SELECTORS}
shr.u32 odd, odd, 4;
lop3.b32 $0, even, odd, 0xF0F0F0F0, 0xE4;
}}""",
        f"""{{{_SELECTORS}
shl.b32 even, even, 4;
lop3.b32 $0, even, odd, 0xF0F0F0F0, 0xE4;
}}""",
    ),
    2: (
        """{
.reg .b32 even, odd;
shr.u32 even, $1, 2;
shr.u32 odd, $1, 4;
lop3.b32 even, even, odd, 0xF0F0F0F0, 0xE4;
and.b32 even, even, 0x33333333;
add.u32 $0, even, 0x22222222;
}""",
        """{
.reg .b32 even;
shl.b32 even, $1, 2;
lop3.b32 even, even, $1, 0xF0F0F0F0, 0xE4;
and.b32 even, even, 0x33333333;
add.u32 $0, even, 0x22222222;
}""",
    ),
}
NIBBLES_CONSTRAINTS = {3: "=r,r,r", 2: "=r,r"}


def in_order(bits: int) -> str:
    """FIELDS[bits] results of int8: the levels of field 0 of each byte, of field 1, …, in the order of coordinates."""
    return _program(bits, [_field(bits, field) for field in range(FIELDS[bits])])


def of_field(bits: int, field: int) -> str:
    """The levels of one field of each byte, for callers who can have one result."""
    return _program(bits, [_field(bits, field)])


def as_they_come(bits: int) -> str:
    """FIELDS[bits] results of int8 in fewer steps: bytes 0 and 1 of four, then bytes 2 and 3.

    At 4 bits the levels of fields 1 and 0 of each byte; at 2 and 3 bits those of fields 2 and 0, then, as two results
    more, those of fields 3 and 1.
    """
    names = [f"{pair}_{half}".lstrip("_") for pair in _PAIRS[bits] for half in ("front", "back")]
    return _program(bits, [f"mov.b32 {{}}, {name};" for name in names])


def constraints(bits: int, results: int) -> str:
    """Of a look-up with that many results."""
    return ",".join(["=r"] * results + ["r"] * len(_inputs(bits)))


def _inputs(bits: int) -> list[str]:
    """The operands' registers in order."""
    words = [f"w{word}" for word in range(WORDS[bits]) for _ in range(4)]
    return [*(("codes", "high") if bits == 3 else ("codes",)), *words]


def _field(bits: int, field: int) -> str:
    """The instruction that collects one field of four bytes."""
    pairs = _PAIRS[bits]
    pair, first = pairs[field % len(pairs)], field < len(pairs)
    front, back = (f"{pair}_{half}".lstrip("_") for half in ("front", "back"))
    return f"prmt.b32 {{}}, {front}, {back}, {'0x7531' if first else '0x6420'};"


def _program(bits: int, results: list[str]) -> str:
    inputs = _inputs(bits)
    moves = [f"mov.b32 {name}, ${len(results) + inputs.index(name)};" for name in dict.fromkeys(inputs)]
    ends = [result.format(f"${i}") for i, result in enumerate(results)]
    return "\n".join(["{", f".reg .b32 {_REGISTERS};", *moves, _BODIES[bits].strip(), *ends, "}"])
