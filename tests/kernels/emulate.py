"""The kernels on int8 units on CPU tensors: the functions of a generated module, called as ordinary Python.

What a tensor of Gluon holds depends on no layout, so that layouts are ignored here; inline PTX is interpreted. A read
or a write outside of what a pointer points into is an error.
"""

import itertools
import re
from types import SimpleNamespace

import torch

INT32, UINT32, POINTER = torch.int32, "uint32", "pointer"


def prmt(a, b, selector):
    source = [(word >> 8 * place) & 255 for word in (a, b) for place in range(4)]
    result = 0
    for place in range(4):
        pick = (selector >> 4 * place) & 15
        byte = sum(torch.where((pick & 7) == at, part, 0) for at, part in enumerate(source))
        result = result | torch.where((pick & 8) != 0, (byte >> 7) * 255, byte) << 8 * place
    return result


def lop3(a, b, c, table):
    choices = [int(table) >> place & 1 for place in range(8)]
    terms = [
        (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
        for place, chosen in enumerate(choices)
        if chosen
    ]
    result = terms[0]
    for term in terms[1:]:
        result = result | term
    return result & 0xFFFFFFFF


OPERATIONS = {
    "prmt": prmt,
    "lop3": lop3,
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "shr": lambda a, b: a >> b,
    "shl": lambda a, b: a << b & 0xFFFFFFFF,
    "mul": lambda a, b: a * b & 0xFFFFFFFF,
}


def assembled(text, inputs, outputs):
    """Run inline PTX over int64 tensors of 32 bits each."""
    registers = {f"${outputs + place}": value for place, value in enumerate(inputs)}
    for line in text.strip("{} ").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            operation, target, rest = re.fullmatch(r"(\w+)[.\w]* (\S+), (.*)", line.strip()).groups()
            operands = [registers[o] if o in registers else torch.tensor(int(o, 0)) for o in rest.split(", ")]
            registers[target] = OPERATIONS[operation](*operands)
    return [registers[f"${place}"] for place in range(outputs)]


def signed(bits):
    return ((bits + 2**31) % 2**32 - 2**31).to(INT32)


def plain(x):
    return x.x if isinstance(x, Tile) else x


class Layout:
    """Any layout, and its parent; the last that it is made of is its shape, where it has one."""

    def __init__(self, *made_of):
        self.shape = made_of[-1] if made_of else None

    parent = property(lambda self: self)


class Tile:
    """A tensor of Gluon."""

    type = SimpleNamespace(layout=Layout())

    def __init__(self, x):
        self.x = torch.as_tensor(x)

    def to(self, dtype, bitcast=False):
        if dtype == UINT32:
            return Tile(self.x.long() & 0xFFFFFFFF)
        if bitcast and self.x.dtype == torch.int64:
            return Tile(signed(self.x))
        return Tile(self.x.view(dtype) if bitcast else self.x.to(dtype))

    shape = property(lambda self: list(self.x.shape))

    def __getitem__(self, place):
        return Tile(self.x[place])

    def __bool__(self):
        return bool(self.x)

    def __index__(self):
        return int(self.x)


def _binary(name):
    operation = getattr(torch.Tensor, name)
    return lambda self, other: (
        NotImplemented if isinstance(other, Pointer) else Tile(operation(self.x, torch.as_tensor(plain(other))))
    )


ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift")
for _name in (*ARITHMETIC, "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tile, f"__{_name}__", _binary(f"__{_name}__"))
Tile.__radd__, Tile.__rmul__ = Tile.__add__, Tile.__mul__
Tile.__rtruediv__ = lambda self, other: Tile(other / self.x)
Tile.__rsub__ = lambda self, other: Tile(other - self.x)


class Pointer:
    """Places in the memory of a tensor."""

    def __init__(self, memory, offset):
        self.memory, self.offset, self.dtype = memory, offset, SimpleNamespace(element_ty=memory.dtype)

    @staticmethod
    def of(tensor):
        whole = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage())
        return Pointer(whole, Tile(tensor.storage_offset()))

    def __add__(self, other):
        return Pointer(self.memory, self.offset + other)

    __radd__ = __add__

    def to(self, dtype, bitcast):
        assert dtype == (POINTER, INT32) and bitcast
        size = self.memory.element_size()
        memory = self.memory.view(torch.uint8)
        return Pointer(memory[: len(memory) // 4 * 4].view(INT32), self.offset * size // 4)

    def inside(self, mask):
        offset, mask = torch.broadcast_tensors(self.offset.x.long(), torch.as_tensor(plain(mask)))
        assert not (mask & ((offset < 0) | (offset >= len(self.memory)))).any(), "outside of the tensor"
        return torch.where(mask, offset, 0), mask


def load(pointer, mask=True, other=0):
    offset, mask = pointer.inside(mask)
    return Tile(torch.where(mask, pointer.memory[offset], torch.tensor(other, dtype=pointer.memory.dtype)))


def store(pointer, value, mask=True):
    offset, mask = pointer.inside(mask)
    pointer.memory[offset[mask]] = torch.broadcast_to(value.x, mask.shape)[mask].to(pointer.memory.dtype)


def inline_asm_elementwise(text, constraints, inputs, dtype, is_pure, pack):
    bits = [(x.x.view(INT32) if x.x.dtype == torch.float32 else x.x).long() & 0xFFFFFFFF for x in inputs]
    if pack == 2:
        # One of two registers, which are alike, as two numbers.
        (word,) = assembled(text, [bits[0][..., 0]], 1)
        return Tile(signed(word).unsqueeze(-1).contiguous().view(dtype))
    if pack == 4:
        (word,) = assembled(text, [bits[0][..., 0, 0]], 1)
        return Tile(signed(word).unsqueeze(-1).contiguous().view(torch.int8).unflatten(-1, (2, 2)))
    types = dtype if isinstance(dtype, tuple) else (dtype,)
    found = tuple(Tile(signed(word)) for word in assembled(text, torch.broadcast_tensors(*bits), len(types)))
    return found if isinstance(dtype, tuple) else found[0]


class Shared:
    """Shared memory, which holds what a copy will bring only after it was waited for."""

    def __init__(self, memory):
        self.memory, self.shape = memory, list(memory.shape)

    def index(self, place):
        return Shared(self.memory[int(plain(place))])

    def slice(self, start, length, dim):
        return Shared(self.memory.narrow(dim, start, length))

    def gather(self, indices, axis):
        assert axis == 0 and self.memory.dim() == 1
        return Tile(self.memory[indices.x])

    def _reinterpret(self, dtype, shape, padded):
        """The memory from its first place on as one piece of rows, they and their numbers as far apart as `padded`."""
        assert dtype == self.memory.dtype and shape[0] == 1
        return Shared(self.memory.as_strided(shape, [1, *padded]))

    def load(self, layout):
        return Tile(self.memory.clone())

    def store(self, x):
        self.memory.copy_(x.x)

    def permute(self, order):
        return Shared(self.memory.permute(order))


class Copies:
    """Groups of copies that are under way."""

    def __init__(self):
        self.groups = [[]]

    def async_load(self, slot, pointer):
        self.groups[-1].append((slot.memory, load(pointer).x))
        # Nobody may read what is being written.
        slot.memory.random_()

    def commit_group(self):
        self.groups.append([])

    def wait_group(self, left):
        while len(self.groups) - 1 > left:
            for memory, content in self.groups.pop(0):
                memory.copy_(content)


class Hopper:
    """Matrix units that work on their own: what they are given is read when it is waited for, and never before."""

    fence_async_shared = staticmethod(lambda: None)

    def warpgroup_mma(self, left, right, product, use_acc=True, is_async=False):
        assert is_async
        return left, right, product

    def warpgroup_mma_wait(self, left_under_way, deps):
        left, right, product = deps[0]
        kept = [each.memory.data_ptr() for each in deps[1:]]
        assert left_under_way == 0 and kept == [x.memory.data_ptr() for x in (left, right) if isinstance(x, Shared)]
        left, right = ((x.memory if isinstance(x, Shared) else x.x).float() for x in (left, right))
        return (Tile(left @ right + product.x),)


def maximum(x, y, propagate_nan=False):
    return Tile((torch.maximum if propagate_nan else torch.fmax)(*map(torch.as_tensor, (plain(x), plain(y)))))


def reduced(x, axis, combine):
    first, *rest = (Tile(part) for part in x.x.unbind(axis))
    for part in rest:
        first = combine(first, part)
    return first


def jit(function=None, **options):
    return function or (lambda found: found)


def padded(intervals, shape, order):
    """Places from row to row, and from one number to the next, of a padded layout of rows."""
    assert all(number & (number - 1) == 0 for pair in intervals for number in pair), "no powers of two"
    assert order == [2, 1, 0] and intervals[-1][0] == shape[-1] and all(size == 1 for size, _ in intervals[:-1])
    step = 1 + sum(padding for _, padding in intervals[:-1])
    return step * shape[-1] + intervals[-1][1], step


def language(place):
    """The module `gl` for one program."""
    return SimpleNamespace(
        **{name: getattr(torch, name) for name in ("int8", "int32", "int64", "float16", "bfloat16", "float32")},
        **dict.fromkeys(("SliceLayout", "DotOperandLayout", "DistributedLinearLayout", "BlockedLayout"), Layout),
        SwizzledSharedLayout=lambda *a: None,
        PaddedSharedLayout=SimpleNamespace(with_identity_for=padded),
        allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.empty(shape, dtype=dtype)),
        NVMMADistributedLayout=lambda *a: Layout(),
        NVMMASharedLayout=lambda *a: None,
        uint32=UINT32,
        pointer_type=lambda dtype: (POINTER, dtype),
        constexpr=lambda x: x,
        static_range=range,
        cdiv=lambda x, y: (x + (y - 1)) // y,
        program_id=lambda axis: Tile(torch.tensor(place[axis], dtype=INT32)),
        arange=lambda start, stop, layout: Tile(torch.arange(start, stop, dtype=INT32)),
        full=lambda shape, value, dtype, layout: Tile(torch.full(shape, value, dtype=dtype)),
        load=load,
        store=store,
        inline_asm_elementwise=inline_asm_elementwise,
        convert_layout=lambda x, layout: x,
        maximum=maximum,
        minimum=lambda x, y: Tile(torch.minimum(*map(torch.as_tensor, (plain(x), plain(y))))),
        where=lambda mask, x, y: Tile(torch.where(mask.x, plain(x), plain(y))),
        abs=lambda x: Tile(x.x.abs()),
        exp2=lambda x: Tile(x.x.exp2()),
        exp=lambda x: Tile(x.x.exp()),
        max=lambda x, axis: reduced(x, axis, maximum),
        sum=lambda x, axis: Tile(x.x.sum(axis, dtype=x.x.dtype)),
        reduce=reduced,
        reshape=lambda x, shape: Tile(x.x.reshape(shape)),
        permute=lambda x, order: Tile(x.x.permute(order)),
        join=lambda x, y: Tile(torch.stack([x.x, y.x], -1)),
        split=lambda x: tuple(map(Tile, x.x.unbind(-1))),
    )


def mma_v2(left, right, product):
    return Tile((left.x.long() @ right.x.long() + product.x).to(INT32))


class Kernel:
    """A kernel of the text of a generated module, launched as the compiled one is."""

    def __init__(self, source, name):
        self.name = name
        self.code = compile(re.sub(r"^(import|from) .*$", "", source, flags=re.M), "kernel", "exec")

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.run(grid, arguments)

    def run(self, grid, arguments):
        for place in itertools.product(*map(range, grid)):
            names = {
                "gl": language(place),
                "gluon": SimpleNamespace(jit=jit, constexpr_function=jit),
                "tl": SimpleNamespace(PropagateNan=SimpleNamespace(ALL=True)),
                "mma_v2": mma_v2,
                "async_copy": Copies(),
                "hopper": Hopper(),
            }
            exec(self.code, names)
            given = (Pointer.of(x) if isinstance(x, torch.Tensor) else x for x in arguments)
            names[self.name](*given)
