"""`python -m rltoken`: which commands there are."""

import ast
import sys
from pathlib import Path

COMMANDS = ("train", "evaluate", "overview", "star", "merge", "serve")


def main() -> None:
    """List the commands, each by the first line of its module's docstring.

    Raises:
        SystemExit: something is asked of it that a command of its own would do.
    """
    for name in COMMANDS:
        # parsed, not imported: the list needs nothing that a command loads
        tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
        print((ast.get_docstring(tree) or "").partition("\n")[0])
    asked = [argument for argument in sys.argv[1:] if argument not in ("-h", "--help")]
    if asked:
        command = asked[0] if asked[0] in COMMANDS else "train"
        print(f"error: {asked[0]}: write python -m rltoken.{command}; --help explains the rest.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
