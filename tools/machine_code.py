"""Reads what NVIDIA's tools say about compiled kernels: instructions, loops and resources."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    guard: str  # "@!P0", or nothing
    opcode: str  # with its modifiers, such as "HMMA.16816.F32.BF16"
    operands: str

    def is_a(self, *names: str) -> bool:
        """Whether its opcode is one of these, whatever its modifiers."""
        return self.opcode.split(".")[0] in names


@dataclass
class Kernel:
    """A function of one architecture, and what a launch of it takes."""

    architecture: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    registers: int = 0  # a thread
    stack: int = 0  # bytes a thread
    local: int = 0  # bytes a thread
    shared: int = 0  # bytes a block, static
    spills: int | None = None  # bytes that ptxas says it stores and loads; None: there is no log

    def count(self, *names: str) -> int:
        """How many of its instructions are one of these."""
        return sum(i.is_a(*names) for i in self.instructions)


_ARCHITECTURE = re.compile(r"^\s*arch = (sm_\w+)", re.MULTILINE)
_FUNCTION = re.compile(r"^\s*Function\s*:?\s*([^\s:]+)\s*:?\s*$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z]\S*?)(?:\s+(.*?))?\s*;")
_RESOURCE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")
_FIELD = {"REG": "registers", "STACK": "stack", "SHARED": "shared", "LOCAL": "local"}


def parse(disassembly: str, resources: str) -> list[Kernel]:
    """Returns the kernels in what `cuobjdump -sass` and `cuobjdump -res-usage` print."""
    kernels: dict[tuple[str, str], Kernel] = {}
    for architecture, name, body in _functions(disassembly):
        kernel = kernels.setdefault((architecture, name), Kernel(architecture, name))
        for line in body.splitlines():
            if found := _INSTRUCTION.match(line):
                address, guard, opcode, operands = found.groups(default="")
                kernel.instructions.append(
                    Instruction(int(address, 16), guard.strip(), opcode, operands)
                )
    for architecture, name, body in _functions(resources):
        kernel = kernels.setdefault((architecture, name), Kernel(architecture, name))
        for key, value in _RESOURCE.findall(body):
            setattr(kernel, _FIELD[key], int(value))
    return list(kernels.values())


def _functions(text: str) -> Iterable[tuple[str, str, str]]:
    """(architecture, name, text up to the next function) of each function."""
    for architecture, image in _split(_ARCHITECTURE, text):
        for name, body in _split(_FUNCTION, image):
            yield architecture, name, body


def _split(heading: re.Pattern[str], text: str) -> list[tuple[str, str]]:
    parts = heading.split(text)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


_COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
_LIBRARY_FUNCTION = re.compile(r"Function properties for _Z\d+nvshmem")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def read_log(log: str, kernels: Iterable[Kernel]) -> list[str]:
    """Adds the spills that `ptxas -v` reports to the kernels, and returns its warnings.

    Those of NVSHMEM's functions are not added.
    """
    known = {(kernel.architecture, kernel.name): kernel for kernel in kernels}
    current: Kernel | None = None
    own = True
    warnings = []
    for line in log.splitlines():
        if found := _COMPILING.search(line):
            current = known.get((found[2], found[1]))
        elif "Function properties for" in line:
            own = _LIBRARY_FUNCTION.search(line) is None
        elif (found := _SPILLS.search(line)) and current is not None and own:
            # A function that the kernel calls has a line of its own.
            current.spills = (current.spills or 0) + int(found[1]) + int(found[2])
        elif re.search(r"warning|Potential Performance Loss", line, re.IGNORECASE):
            warnings.append(line.strip())
    return warnings


def main_loops(kernel: Kernel, *names: str) -> list[list[Instruction]]:
    """The innermost loops with one of these instructions in them.

    Loops are strongly connected components of the control flow, not ranges of addresses: the
    compiler moves what it thinks is rare, such as the second try of a wait, behind the kernel.
    """
    code = kernel.instructions
    place = {instruction.address: i for i, instruction in enumerate(code)}
    successors = [_successors(code, place, i) for i in range(len(code))]
    found: list[list[Instruction]] = []

    def descend(nodes: set[int]) -> bool:
        """Whether there is such a loop among the nodes."""
        deepest = False
        for loop in _loops(nodes, successors):
            if not any(code[i].is_a(*names) for i in loop):
                continue
            deepest = True
            # Without its entry only the loops inside it remain.
            entries = {t for s in nodes - loop for t in successors[s] if t in loop}
            if not descend(loop - ({min(entries)} if entries else {min(loop)})):
                found.append([code[i] for i in sorted(loop)])
        return deepest

    descend(set(range(len(code))))
    return found


def _successors(code: list[Instruction], place: dict[int, int], index: int) -> list[int]:
    instruction = code[index]
    following = [index + 1] if index + 1 < len(code) else []
    conditional = instruction.guard not in ("", "@PT", "@UPT")
    if instruction.is_a("EXIT", "RET", "BRX", "JMX", "BPT"):
        return following if conditional else []
    if instruction.is_a("BRA", "JMP", "CALL"):
        *condition, target = instruction.operands.rsplit(maxsplit=1)
        goal = place.get(int(target, 16)) if re.fullmatch(r"0x[0-9a-f]+", target) else None
        # Where a call returns to, and a branch does not go if a predicate among its operands fails.
        if conditional or condition or instruction.is_a("CALL"):
            return following if goal is None else [*following, goal]
        return [] if goal is None else [goal]
    return following


def _loops(nodes: set[int], successors: list[list[int]]) -> list[set[int]]:
    """The strongly connected components that have an edge (Tarjan, without recursion)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    loops: list[set[int]] = []

    def inside(node: int) -> Iterator[int]:
        return (s for s in successors[node] if s in nodes)

    for root in sorted(nodes):
        if root in order:
            continue
        order[root] = low[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        work = [(root, inside(root))]
        while work:
            node, edges = work[-1]
            for target in edges:
                if target not in order:
                    order[target] = low[target] = len(order)
                    stack.append(target)
                    on_stack.add(target)
                    work.append((target, inside(target)))
                    break
                if target in on_stack:
                    low[node] = min(low[node], order[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    component: set[int] = set()
                    while not component or node not in component:
                        component.add(stack.pop())
                    on_stack -= component
                    if len(component) > 1 or node in successors[node]:
                        loops.append(component)
    return loops
