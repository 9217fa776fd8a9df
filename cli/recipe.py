"""mien recipe: what it is to train in stages, and those recipes that come with mien."""

import argparse

from ..core.config import recipes
from .lines import tell, tell_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs and their options."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    text = "Name every recipe and what it is for."
    listing = verbs.add_parser("list", help=text, description=text)
    text = "Print the stages of a recipe: what each sets, and when it ends."
    show = verbs.add_parser("show", help=text, description=text)
    show.add_argument("name", metavar="NAME|FILE", help="as `mien recipe list` has it, or a file")
    for verb in (listing, show):
        verb.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Carry out one verb."""
    return _list(args) if args.verb == "list" else _show(args)


def _list(args: argparse.Namespace) -> int:
    available = recipes.available()
    if args.json:
        tell_json([recipe.to_dict() for recipe in available])
        return 0
    for recipe in available:
        tell(f"{recipe.name}  {recipe.description}".rstrip())
    tell("", "A recipe of one's own is a TOML file: `mien train --recipe FILE`.")
    return 0


def _show(args: argparse.Namespace) -> int:
    recipe = recipes.load(args.name)
    if args.json:
        tell_json(recipe.to_dict())
        return 0
    tell(f"{recipe.name}: {recipe.description}" if recipe.description else recipe.name)
    for line in recipes.describe(recipe):
        tell(f"  {line}")
    return 0
