"""PTX run on arrays: what a kernel computes, without a GPU.

All threads of a program go through each instruction together, so a branch must be one that all of them take. Copies are
done at once, barriers are nothing, and `ex2`, `lg2`, `rcp`, `rsqrt` and `tanh` are as far off as NVIDIA lets them be.

Source: PTX ISA 8.7.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

LANES = 32  # of a warp
SHARED_BYTES = 2**16
BUFFER_BITS = 40  # an address is the number of a buffer, then a place in it
WIDTHS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
SIGNED = {np.uint8: np.int8, np.uint16: np.int16, np.uint32: np.int32, np.uint64: np.int64}
FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": bfloat16}
PLAIN = {
    np.float32: np.uint32,
    np.float16: np.uint16,
    bfloat16: np.uint16,
    np.int16: np.uint16,
    np.int32: np.uint32,
    np.int64: np.uint64,
}


def run(text: str, names: Sequence[str], given: Mapping[str, Any], grid: tuple[int, int, int]) -> None:
    """Runs all programs of a kernel, one after the other.

    Args:
      text: PTX of one kernel.
      names: of its parameters, in order.
      given: arrays, which are written in place, ints and float32 by name.
      grid: programs along x, y and z.
    """
    arguments = {number: given[name] for number, name in enumerate(names)}
    buffers = {number + 1: x for number, x in arguments.items() if isinstance(x, np.ndarray)}
    parameters = {number: (number + 1) << BUFFER_BITS for number in arguments}
    parameters |= {number: x for number, x in arguments.items() if isinstance(x, int)}
    parameters |= {number: int(x.view(np.int32)) for number, x in arguments.items() if isinstance(x, np.float32)}
    program, labels = _parse(text)
    threads = int(re.search(r"\.reqntid (\d+)", text)[1])
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                _Program(buffers, parameters, {"x": x, "y": y, "z": z}, threads).run(program, labels)


def strides(name: str, array: NDArray, axes: str) -> dict[str, int]:
    """Those of the first axes, in elements, by the names that kernels give them."""
    sizes = zip(axes, array.strides, strict=False)
    return {f"{name}_stride_{axis}": size // array.itemsize for axis, size in sizes}


def _parse(text):
    """(predicate, parts of the opcode, operands) of each instruction, and where labels are."""
    program, labels = [], {}
    body = re.sub(r"//.*", "", text[text.index("{", text.index(".entry")) :])
    for statement in re.split(r"[;\n]", body):
        statement = statement.strip().removeprefix("{").strip()
        if found := re.fullmatch(r"(\$L\w+):", statement):
            labels[found[1]] = len(program)
        elif found := re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", statement):
            program.append((found[1], found[2].split("."), _operands(found[3] or "")))
        else:
            assert statement in ("", "}") or statement.startswith("."), f"What is this of PTX: {statement}"
    return program, labels


def _operands(text):
    """Split at commas outside brackets; a list where braces hold several."""
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)
    return [re.findall(r"[%\w.]+", part) if part.startswith("{") else part.strip() for part in parts]


class _Program:
    def __init__(self, buffers, parameters, place, threads):
        self.buffers, self.parameters, self.threads = buffers, parameters, np.arange(threads, dtype=np.uint32)
        self.shared = np.full(SHARED_BYTES, 0xA5, np.uint8)
        self.registers = {"%laneid": self.threads % LANES, "%tid.x": self.threads, "global_smem": 0 * self.threads}
        self.registers |= {f"%ctaid.{axis}": np.full(threads, at, np.uint32) for axis, at in place.items()}

    def run(self, program, labels):
        at = 0
        while at < len(program):
            predicate, (name, *kinds), operands = program[at]
            live = self.predicate(predicate)
            at += 1
            if name in ("ret", "exit"):
                assert live.all()
                return
            if name == "bra":
                assert live.all() or not live.any(), "A branch must be one that all lanes take."
                at = labels[operands[0]] if live.any() else at
            elif live.any():
                getattr(self, f"do_{name}", self.compute)(name, kinds, operands, live)

    def predicate(self, name):
        if name is None:
            return np.ones(len(self.threads), bool)
        return ~self.registers[name[1:]] if name.startswith("!") else self.registers[name]

    def value(self, operand, dtype):
        """A register, or an immediate, as `dtype`; what nothing was written to holds anything."""
        if operand in self.registers:
            bits = self.registers[operand]
        elif operand.startswith("%"):
            bits = np.full(len(self.threads), 0x5AA5A55AA55A5AA5, np.uint64).astype(PLAIN.get(dtype, dtype))
        elif operand.startswith("0f"):
            bits = np.full(len(self.threads), int(operand[2:], 16), np.uint32)
        else:
            size = PLAIN.get(dtype, dtype)
            number = int(operand.rstrip("U"), 0)
            bits = np.full(len(self.threads), number % 2 ** (8 * np.dtype(size).itemsize), size)
        if bits.dtype == dtype or dtype is bool:
            return bits
        if bits.dtype.itemsize == np.dtype(dtype).itemsize:
            return bits.view(dtype)
        return bits.astype(dtype)

    def write(self, operand, values, live):
        if values.dtype.itemsize == 1 and values.dtype != bool:  # no register is as narrow
            values = values.astype(np.int16 if values.dtype == np.int8 else np.uint16)
        values = values.view(PLAIN.get(values.dtype.type, values.dtype))
        old = self.registers.get(operand)
        self.registers[operand] = values if live.all() or old is None else np.where(live, values, old)

    def compute(self, name, kinds, operands, live):
        """What FUNCTIONS says, of operands of one type; the product of `wide` is as wide as two."""
        dtype, types = _dtype(kinds[-1]), [_dtype(kinds[-1])] * len(operands[1:])
        if kinds[0] == "wide":
            dtype = np.int64 if kinds[-1][0] == "s" else np.uint64
            types[2:] = [dtype] * len(types[2:])
        sources = [self.value(x, kind).astype(dtype) for x, kind in zip(operands[1:], types, strict=True)]
        function = _toward_zero if "rz" in kinds else FUNCTIONS[name]
        with np.errstate(all="ignore"):
            result = _flushed(function(*map(_flushed, sources))) if "ftz" in kinds else function(*sources)
        self.write(operands[0], result, live)

    def do_setp(self, name, kinds, operands, live):
        left, right = (self.value(x, _dtype(kinds[-1])) for x in operands[1:])
        self.write(operands[0], COMPARISONS[kinds[0]](left, right), live)

    def do_selp(self, name, kinds, operands, live):
        left, right = (self.value(x, _dtype(kinds[-1])) for x in operands[1:3])
        self.write(operands[0], np.where(self.registers[operands[3]], left, right), live)

    def do_cvt(self, name, kinds, operands, live):
        """From the last type to the one before; to `f16x2` from two, the first of which is the high half."""
        sources = [self.value(x, _dtype(kinds[-1])) for x in operands[1:]]
        with np.errstate(all="ignore"):
            if kinds[-2] == "f16x2":
                high, low = (x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in sources)
                result = high << np.uint32(16) | low
            else:
                result = sources[0].astype(_dtype(kinds[-2]))
        self.write(operands[0], result, live)

    def do_mov(self, name, kinds, operands, live):
        """Of one register, or of parts of one into several, or of several into one."""
        target, source = operands
        if not isinstance(target, list) and not isinstance(source, list):
            self.compute(name, kinds, operands, live)
        elif isinstance(target, list):
            part = WIDTHS[str(int(kinds[-1][1:]) // len(target))]
            for one, column in zip(target, self.value(source, _dtype(kinds[-1]))[:, None].view(part).T, strict=True):
                self.write(one, column.copy(), live)
        else:
            part = WIDTHS[str(int(kinds[-1][1:]) // len(source))]
            parts = np.stack([self.value(one, part) for one in source], 1)
            self.write(target, parts.view(_dtype(kinds[-1]))[:, 0], live)

    def do_shfl(self, name, kinds, operands, live):
        assert live.all(), "All lanes must shuffle."
        value, lane = self.value(operands[1], np.uint32), self.value(operands[2], np.uint32)
        lane = lane % LANES if kinds[1] == "idx" else self.threads % LANES ^ lane
        self.write(operands[0], value[self.threads // LANES * LANES + lane], live)

    def do_redux(self, name, kinds, operands, live):
        value = self.value(operands[1], np.int32).reshape(-1, LANES)
        self.write(operands[0], np.repeat(getattr(value, kinds[1])(1), LANES), live)

    def do_bar(self, *_):
        """All lanes are here."""

    def do_griddepcontrol(self, *_):
        """All programs of the kernel before are done."""

    def do_cp(self, name, kinds, operands, live):
        """A copy of so many bytes, of which the source has some; zeros are the rest."""
        if kinds[1] in ("ca", "cg"):
            to, source, size = *(self.address(x) for x in operands[:2]), int(operands[2], 0)
            has = self.value(operands[3], np.int32)
            for lane in np.flatnonzero(live):
                row = self.bytes_at(to[lane], True, size)
                row[:] = self.bytes_at(source[lane], False, size) if has[lane] == size else 0
                assert has[lane] in (0, size)

    def do_mma(self, name, kinds, operands, live):
        """Lane 4·g + t has rows g and g + 8 of A, column g of B, and 2·t and 2·t + 1 of the sum; of k 4 bytes each.

        Sums of floats are rounded toward zero.
        """
        assert live.all() and kinds[3:5] == ["row", "col"]
        a, b, c = (np.stack([self.value(x, np.uint32) for x in registers], 1) for registers in operands[1:])
        whole = kinds[2] == "m16n8k32" and kinds[-4:] == ["s32", "s8", "s8", "s32"]
        assert whole or (kinds[2] == "m16n8k16" and kinds[-4:] in (["f32", x, x, "f32"] for x in ("f16", "bf16")))
        part, total = (np.int8, np.int32) if whole else (FLOATS[kinds[-2]], np.float32)
        wide = np.int64 if whole else np.float64
        left = a.view(part).reshape(-1, 8, 4, 2, 2, 4 // np.dtype(part).itemsize)  # warp, g, t, k's half, row's half, k
        left = left.transpose(0, 4, 1, 3, 2, 5).reshape(len(left), 16, -1).astype(wide)
        right = b.view(part).reshape(-1, 8, 4, 2, 4 // np.dtype(part).itemsize)
        right = right.transpose(0, 3, 2, 4, 1).reshape(len(right), -1, 8).astype(wide)
        with np.errstate(all="ignore"):
            product = (left @ right).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4) + c.view(total)
        for register, column in zip(operands[0], product.T, strict=True):
            self.write(register, column.astype(total) if whole else _truncated(column), live)

    def do_ld(self, name, kinds, operands, live):
        targets = operands[0] if isinstance(operands[0], list) else [operands[0]]
        size = int(kinds[-1][1:])
        if kinds[0] == "param":
            number = self.parameters[int(re.search(r"(\d+)\]", operands[1])[1])]
            wide = np.uint64 if targets[0].startswith("%rd") else np.uint32
            self.write(targets[0], np.full(len(self.threads), number, np.int64).astype(wide), live)
            return
        where, rows = self.address(operands[1]), np.zeros((len(self.threads), len(targets)), WIDTHS[str(size)])
        for lane in np.flatnonzero(live):
            count = len(targets) * size // 8
            rows[lane] = self.bytes_at(where[lane], kinds[0] == "shared", count).view(rows.dtype)
        for target, column in zip(targets, rows.T, strict=True):
            self.write(target, column.copy(), live)

    def do_st(self, name, kinds, operands, live):
        sources = operands[1] if isinstance(operands[1], list) else [operands[1]]
        where, dtype = self.address(operands[0]), WIDTHS[kinds[-1][1:]]
        rows = np.stack([self.value(x, dtype) for x in sources], 1)
        for lane in np.flatnonzero(live):
            self.bytes_at(where[lane], kinds[0] == "shared", rows[lane].nbytes)[:] = rows[lane].view(np.uint8)

    def do_stmatrix(self, name, kinds, operands, live):
        for i, source in enumerate(operands[1]):
            for word, place in zip(
                self.value(source, np.uint32), self.matrix(operands[0], kinds, i, live), strict=True
            ):
                self.bytes_at(place, True, 4)[:] = np.array([word]).view(np.uint8)

    def do_ldmatrix(self, name, kinds, operands, live):
        loaded = [self.matrix(operands[1], kinds, i, live) for i in range(len(operands[0]))]
        for target, places in zip(operands[0], loaded, strict=True):
            self.write(target, np.array([self.bytes_at(x, True, 4).view(np.uint32)[0] for x in places]), live)
        if "trans" in kinds:
            for target in operands[0]:
                halves = self.registers[target].view(np.uint16).reshape(-1, 8, 8)  # of 16 bits: rows, columns
                self.registers[target] = np.ascontiguousarray(halves.transpose(0, 2, 1)).reshape(-1).view(np.uint32)

    def matrix(self, operand, kinds, i, live):
        """Where lane l has its word of matrix i: lane 8·i + r has the address of row r; word l % 4 of row l / 4."""
        assert live.all() and (kinds[0] == "sync" and "m8n8" in kinds)
        lane = self.threads % LANES
        return self.address(operand)[self.threads - lane + 8 * i + lane // 4] + 4 * (lane % 4)

    def address(self, operand):
        base, plus = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand).groups()
        return self.registers[base].astype(np.int64) + int(plus or 0)

    def bytes_at(self, address, shared, count):
        place = int(address) & (2**BUFFER_BITS - 1)
        memory = self.shared if shared else self.buffers[int(address) >> BUFFER_BITS].reshape(-1).view(np.uint8)
        assert place % count == 0, f"An address must be a multiple of the {count} bytes it is of, got {place}."
        assert place + count <= memory.size, "An address must lie in its buffer."
        return memory[place : place + count]


def _dtype(kind):
    """Of PTX's .b8 to .b64, .u…, .s…, floats and .pred."""
    if kind in FLOATS or kind == "pred":
        return FLOATS.get(kind, bool)
    plain = WIDTHS[kind[1:]]
    return SIGNED[plain] if kind[0] == "s" else plain


def prmt(a, b, selectors):
    """Byte i of the result is byte s & 7 of a, then b, where s is nibble i; of its sign alone where s has bit 3."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        selector = (selectors >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (8 * (selector & 7)).astype(np.uint64) & np.uint64(0xFF)).astype(np.uint32)
        byte = np.where(selector & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def lop3(a, b, c, table):
    """Bit by bit the entry of `table` that the bits of a, b and c number."""
    bits = [(n >> 2 & 1, n >> 1 & 1, n & 1) for n in range(8) if int(table.flat[0]) >> n & 1]
    terms = [(a if x else ~a) & (b if y else ~b) & (c if z else ~c) for x, y, z in bits]
    return np.bitwise_or.reduce(terms)


def _extract(x, first, count):
    """`bfe`: a field of bits, with its sign where x is signed."""
    size = 8 * x.dtype.itemsize
    left = (size - first.astype(np.int64) - count).astype(x.dtype)
    return (x << left) >> (size - count.astype(np.int64)).astype(x.dtype)


def _fma(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _toward_zero(a, b):
    """a + b, rounded so: what the nearest float leaves says whether it is too large."""
    nearest = a + b
    rest = np.where(np.abs(a) >= np.abs(b), b - (nearest - a), a - (nearest - b))
    past = (rest != 0) & (nearest != 0) & (np.signbit(rest) != np.signbit(nearest))
    return np.where(past, np.nextafter(nearest, np.float32(0)), nearest)


def _truncated(x):
    """float64 as float32, rounded so."""
    with np.errstate(all="ignore"):
        nearest = x.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)


def _flushed(x):
    """Subnormals as zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _off(x, relative):
    """x, that far off to either side."""
    side = np.where(x.view(np.uint32) & 1, 1 + relative, 1 - relative)
    return (x.astype(np.float64) * side).astype(np.float32)


FUNCTIONS: dict[str, Callable] = {
    "mov": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "fma": _fma,
    "div": lambda a, b: a / b if a.dtype == np.float32 else (a - np.fmod(a, b)) // b,
    "rem": np.fmod,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: _off((1 / np.sqrt(a.astype(np.float64))).astype(np.float32), 2.0**-22.9),
    "ex2": lambda a: _off(np.exp2(a.astype(np.float64)).astype(np.float32), 2.0**-22),
    "lg2": lambda a: _off(np.log2(a.astype(np.float64)).astype(np.float32), 2.0**-22),
    "rcp": lambda a: _off((1 / a.astype(np.float64)).astype(np.float32), 2.0**-23),
    "tanh": lambda a: _off(np.tanh(a), 2.0**-11),
    "abs": np.abs,
    "neg": np.negative,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "shf": lambda a, b, n: (b << (n & 31)) | (a >> ((32 - (n & 31)) & 31)),
    "bfe": _extract,
    "prmt": prmt,
    "lop3": lop3,
}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
