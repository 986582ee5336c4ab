"""Count the lines of code of a program."""

import ast
import io
import token
import tokenize

LAYOUT = (token.COMMENT, token.NL, token.NEWLINE, token.INDENT, token.DEDENT, token.ENDMARKER)


def count_lines_of_code(source: str) -> int:
    """Count the lines without blank lines, comments, docstrings and imports."""
    code = {
        line
        for part in tokenize.generate_tokens(io.StringIO(source).readline)
        if part.type not in LAYOUT
        for line in range(part.start[0], part.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        if isinstance(node, ast.stmt) and (is_import or _is_docstring(node)):
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
