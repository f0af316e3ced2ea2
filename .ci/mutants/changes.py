"""Which small changes of the core's code there are: those of cosmic-ray's operators that say something about the tests.

Left out, because no test of behaviour can or should see them: annotations and `X | None` as a type, `if TYPE_CHECKING`,
messages (all of a `raise`, calls of `warn`), docstrings, imports, and `strict=` of zip, which guards against mistakes in the
code itself; stars that are no operators, as in `f(*, a)` and `{**a}`; arithmetic into bit operations, equality into identity,
and back, which fail at once or make no difference.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

CORE = [
    *("engine/*", "patching/*", "sae/*", "circuits/*", "attribution/*", "pairs/*", "model/layer", "nodes"),
    *("effects/values", "effects/measured", "effects/selection", "effects/statistics", "effects/table", "effects/frames"),
    *("effects/collector", "effects/storage", "effects/audit"),
]
ARITHMETIC, BITS = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}, {"BitOr", "BitAnd", "BitXor"}
BINARY = {"arith_expr", "term", "power", "expr", "and_expr", "xor_expr"}


@dataclass(frozen=True)
class Mutant:
    """The place of that number in a file where an operator applies, in a statement from line `first` to `last`."""

    file: str
    operator: str
    number: int
    line: int
    first: int
    last: int

    def source(self) -> bytes | None:
        """The whole file with the change; None if it is no Python, or the same, as 1e100 + 1."""
        before = Path(self.file).read_text()
        code = mutate_code(before, get_operator(f"core/{self.operator}")(), self.number)
        try:
            same = ast.dump(ast.parse(code)) == ast.dump(ast.parse(before))
        except SyntaxError:
            return None
        return None if same else code.encode()


def mutants(package: Path) -> Iterator[Mutant]:
    """All changes of the core's files."""
    names = [name.removeprefix("core/") for name in operator_names()]
    for path in sorted(path for pattern in CORE for path in package.glob(f"{pattern}.py")):
        text = path.read_text()
        nodes, tree = [*ast_nodes(get_ast(text))], ast.parse(text)
        silent, statements = [*_silent(tree)], [*_statements(tree)]
        for name in filter(_tells, names):
            operator = get_operator(f"core/{name}")()
            places = [(node, start) for node in nodes for start, _ in operator.mutation_positions(node)]
            for number, (node, start) in enumerate(places):
                star = name.startswith("ReplaceBinary") and node.parent.type not in BINARY
                if not star and not any(begin <= start < end for begin, end in silent):
                    around = [(last - first, first, last) for first, last in statements if first <= start[0] <= last]
                    _, first, last = min(around, default=(0, start[0], start[0]))
                    yield Mutant(str(path), name, number, start[0], first, last)


def _tells(operator: str) -> bool:
    kind, *swap = operator.split("_")
    if kind == "ReplaceBinaryOperator":
        return set(swap) <= ARITHMETIC or set(swap) <= BITS
    if kind == "ReplaceComparisonOperator":
        return len({"Is", "IsNot"} & set(swap)) != 1
    return not get_operator(f"core/{operator}").arguments()


def _silent(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the parts of the code begin and end in which nothing is changed."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.arg(annotation=ast.expr() as found)
                | ast.AnnAssign(annotation=found)
                | ast.FunctionDef(returns=ast.expr() as found)
                | (ast.Raise() | ast.Call(func=ast.Attribute(attr="warn")) | ast.If(test=ast.Name(id="TYPE_CHECKING")) as found)
                | (ast.keyword(arg="strict") | ast.BinOp(op=ast.BitOr(), right=ast.Constant(value=None)) as found)
            ):
                yield (found.lineno, found.col_offset), (found.end_lineno, found.end_col_offset)


def _statements(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """First and last line of every statement; of one with a body, of its head."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            body = getattr(node, "body", None)
            start = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))])
            yield start, max(start, body[0].lineno - 1) if body else node.end_lineno
