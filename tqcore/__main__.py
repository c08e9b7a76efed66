"""python -m tqcore verify SOURCE: whether a model's layers bear packed keys and values."""

import argparse
import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from tqcore import report, verify
from tqcore.file import load_arrays, save_arrays

SOURCE = """a safetensors file of captured queries, keys and values (names in `tqcore.verify`);
a Hugging Face model id or folder, with --text; or FILE.py:FUNCTION, called with the text, which returns such arrays by
name (`tqjax.capture` makes them of a Flax model)"""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 if every layer has a safe setting at the bits asked for, 1 if one has none, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tqcore")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", description=main.__doc__)
    command.add_argument("source", help=SOURCE)
    command.add_argument("--text", type=Path, help="text file that a model reads")
    command.add_argument("--tokens", type=int, default=1024, help="most tokens of the text (default 1024)")
    command.add_argument("--bits", default="4/4", help="of keys and values, to be safe at (default 4/4)")
    command.add_argument("--theta", type=float, help="base of the rotary frequencies, where the file does not say")
    command.add_argument(
        "--queries", type=int, default=verify.QUERIES, help="most queries to measure (default %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="all figures to stdout, the table to stderr")
    command.add_argument("--plot", type=Path, default=Path("verify.png"), help="picture to write (default %(default)s)")
    command.add_argument("--save", type=Path, help="safetensors file to write the captured arrays to")
    args = parser.parse_args(argv)
    try:
        return _verify(args)
    except ImportError as error:
        print(f"error: {error}; pip install 'tqjax[verify]', and [hf] or [flax] for a model", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def _verify(args: argparse.Namespace) -> int:
    bits = args.bits.split("/")
    if len(bits) != 2 or not all(part.isdecimal() for part in bits):
        raise ValueError(f"`--bits` must be KEYS/VALUES such as 4/4, got {args.bits!r}.")
    for path in filter(None, (args.plot, args.save)):
        if not path.parent.is_dir():
            raise ValueError(f"`--plot` and `--save` must lie in a folder that exists, got {path}.")
    tensors = _tensors(args)
    if args.save:
        save_arrays(tensors, args.save)
    pair, out = (int(bits[0]), int(bits[1])), sys.stderr if args.json else sys.stdout
    found = verify.verify(tensors, bits=pair, theta=args.theta, queries=args.queries, track=report.progress)
    report.print_table(found, out)
    report.draw(found, args.plot)
    print(f"picture: {args.plot}", file=out)
    if args.json:
        print(json.dumps(report.as_json(found, args.source), indent=1))
    return 0 if found.safe else 1


def _tensors(args: argparse.Namespace) -> dict[str, Any]:
    """The capture that `source` names or makes."""
    path, _, function = args.source.rpartition(":")
    if args.source.endswith(".safetensors"):
        return load_arrays(args.source)
    if args.text is None:
        raise ValueError(f"`--text` must be given where SOURCE is not a .safetensors file, got {args.source!r}.")
    text = args.text.read_bytes()[: 64 * args.tokens].decode(errors="replace")
    if args.tokens < 2 or not text:
        raise ValueError(f"`--text` must not be empty and `--tokens` at least 2, got {args.text}, {args.tokens}.")
    try:
        if path.endswith(".py"):
            sys.path.insert(0, str(Path(path).resolve().parent))
            return runpy.run_path(path)[function](text, args.tokens)
        return importlib.import_module("tq_torch.capture").capture_pretrained(args.source, text, args.tokens)
    except (ImportError, ValueError, OSError):
        raise
    except Exception as error:  # of a model or a function that is not ours
        raise ValueError(f"{args.source} must give a capture, got {type(error).__name__}: {error}.") from error


if __name__ == "__main__":
    sys.exit(main())
