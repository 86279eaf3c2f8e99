"""Draw the toy cities into a folder.

    python -m data.toy --root data/toy_cities --seed 0

Runs draw seed 0 into `data.toy_root` themselves. For other drawings, name a folder of their own as the three roots and
set data.toy_root=''.
"""

from __future__ import annotations

import argparse

from data.toy.files import COUNTS, generate
from utils.engine.command_line import guarded


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the toy cities in the layouts of the real data sets.")
    parser.add_argument("--root", default="data/toy_cities", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all drawings (default: %(default)s)")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed must be 0 or more")

    def call() -> None:
        root = generate(args.root, args.seed)
        print(f"{root}: " + ", ".join(f"{count} {split}" for split, count in COUNTS.items()) + " images")

    guarded(call)


if __name__ == "__main__":
    main()
