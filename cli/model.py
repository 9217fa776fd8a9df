"""mien model: what a model folder holds, whether it is whole, going back, other programs' files."""

import argparse
import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.system.paths import expanded
from ..core.system.printable import plural
from . import exchange
from .lines import tell, tell_json
from .weights_flag import add_weights

_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs and their options."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    texts = {
        "info": "Tell what the model is, its sessions and its saves.",
        "verify": "Compare every save with its checksums; exit code 2 where one is damaged.",
        "restore": "Have an earlier save be the one in use; what it replaces is archived.",
        "nan-scan": "Look for numbers that are not finite; exit code 2 where there are any.",
        "inference": "Write the weights that a swap needs to one file.",
    }
    verb = {name: verbs.add_parser(name, help=t, description=t) for name, t in texts.items()}
    for name, sub in verb.items():
        sub.add_argument("model", metavar="MODEL", type=Path, help="model folder")
        if name in ("nan-scan", "inference"):
            sub.add_argument(
                "--generation", metavar="NAME", help="a save, or backup (default: the newest)"
            )
    source = verb["restore"].add_mutually_exclusive_group()
    source.add_argument(
        "--generation", metavar="NAME", default="backup", help="a save (default: backup)"
    )
    source.add_argument(
        "--snapshot", metavar="FOLDER", type=Path, help="a snapshot, or another copy of the model"
    )
    verb["restore"].add_argument(
        "--force", action="store_true", help="even where the copy is of another run"
    )
    inference = verb["inference"]
    inference.add_argument(
        "-o", "--output", metavar="FILE.safetensors", type=Path, required=True, help="to write"
    )
    inference.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights"
    )
    inference.add_argument(
        "--side", choices=("a", "b", "both"), default="both", help="as whom faces are decoded"
    )
    add_weights(inference)
    inference.add_argument("--force", action="store_true", help="replace the file")
    for sub in (*verb.values(), *exchange.add_verbs(verbs)):
        sub.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(args: argparse.Namespace) -> int:
    """Carry out one verb."""
    args.model = expanded(args.model)
    verbs = {
        "info": _info,
        "verify": _verify,
        "restore": _restore,
        "nan-scan": _nan_scan,
        "inference": _inference,
        "export": exchange.run_export,
        "import": exchange.run_import,
    }
    return verbs[args.verb](args)


def _info(args: argparse.Namespace) -> int:
    from ..core.checkpoint.verify import facts_of
    from ..core.exchange.targets import targets_of

    facts = facts_of(args.model)
    facts["exports"], facts["exports_refused"] = targets_of(facts["trainer"], facts["options"])
    if args.json:
        tell_json(facts)
        return 0
    options = facts["options"] or {}
    parameters = facts["parameters"]
    lines = {
        "model": f"{facts['trainer']} in {facts['path']}",
        "options": ", ".join(f"{key} = {json.dumps(value)}" for key, value in options.items()),
        "sizes": f"{facts['input_px']} px in, {', '.join(map(str, facts['output_px'] or ()))} out",
        "parameters": "unknown" if parameters is None else f"{parameters:,}",
        "iterations": f"{facts['iterations']:,}",
        "lowest loss": _lowest_loss(facts),
        "backup": _backup(facts),
        "run": f"{facts['run_id']}, saved by mien {facts['mien_version']}",
        "exports": _exports(facts),
        "in use": f"by {facts['in_use_by']}" if facts["in_use_by"] else "by no run",
    }
    for name, text in lines.items():
        tell(f"{name:<12} {text or 'none'}")
    for title, saves in (
        ("saves", map(_save, facts["generations"])),
        ("snapshots", (_copied(path, facts) for path in facts["snapshots"])),
        ("sessions", map(_session, facts["sessions"])),
    ):
        for number, line in enumerate(saves):
            tell(f"{'' if number else title:<12} {line}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ..core.checkpoint.verify import verify

    verdicts = verify(args.model)
    damaged = [verdict for verdict in verdicts if verdict.damage]
    if args.json:
        tell_json([asdict(verdict) for verdict in verdicts])
    else:
        for verdict in verdicts:
            said = f"DAMAGED: {verdict.damage}" if verdict.damage else "whole"
            tell(f"{verdict.name:<20} {said}{_size_of(verdict.size_bytes)}")
        if damaged:
            tell(_remedy(args.model, verdicts))
    return 2 if damaged else 0


def _remedy(model: Path, verdicts: list[Any]) -> str:
    """What to do about damage, in a line."""
    whole = [verdict.name for verdict in verdicts if not verdict.damage]
    saves = [name for name in whole if name.startswith("generations/")]
    folder = shlex.quote(str(model))
    if saves:
        return "training goes on from the newest whole save; the damaged one is left as it is"
    if "backup" in whole:
        return f"no save is whole, but the backup is: `mien model restore {folder}`"
    return f"nothing is whole here: `mien model restore {folder} --snapshot FOLDER`, or a copy"


def _restore(args: argparse.Namespace) -> int:
    from ..core.history.restore import restore

    snapshot = expanded(args.snapshot) if args.snapshot else None
    done = restore(args.model, generation=args.generation, snapshot=snapshot, force=args.force)
    if args.json:
        archive = None if done.archive is None else str(done.archive)
        tell_json(asdict(done) | {"archive": archive})
        return 0
    if done.archive is None:
        tell(f"iteration {done.iterations:,} is in use already; nothing was changed")
        return 0
    tell(f"iteration {done.iterations:,} is in use (generation {done.generation})")
    what = ", ".join(done.archived) or "state.json and config.toml"
    tell(f"what it replaced is in {done.archive}: {what}")
    return 0


def _nan_scan(args: argparse.Namespace) -> int:
    from ..core.checkpoint.verify import nan_scan

    name, num_tensors, found = nan_scan(args.model, args.generation)
    if args.json:
        tensors = [asdict(bad) for bad in found]
        facts = {"generation": name, "num_tensors": num_tensors, "not_finite": tensors}
        tell_json(facts, indent=None)
        return 2 if found else 0
    for bad in found:
        tell(
            f"{bad.file}: {bad.tensor}: {bad.nan:,} NaN and {bad.infinite:,} infinite "
            f"of {bad.total:,}"
        )
    counted = (
        f"{len(found)} of {num_tensors} {plural(num_tensors, 'tensor')} of generation {name} "
        f"{plural(len(found), 'holds', 'hold')}"
    )
    if found:
        folder = shlex.quote(str(args.model))
        tell(f"{counted} numbers that are not finite; go back: `mien model restore {folder}`")
        return 2
    tell(f"{counted} numbers that are not finite: it is clean")
    return 0


def _inference(args: argparse.Namespace) -> int:
    from ..core.checkpoint.inference import write_inference

    target = expanded(args.output)
    metadata = write_inference(
        args.model,
        target,
        generation=args.generation,
        precision=args.precision,
        side=args.side,
        weights=args.weights,
        force=args.force,
    )
    if args.json:
        tell_json({"path": str(target), "metadata": metadata})
        return 0
    sides = "sides a and b" if args.side == "both" else f"side {args.side}"
    size = _size_of(target.stat().st_size)
    weights = "the average of the weights" if metadata["weights"] == "ema" else "the weights"
    tell(f"wrote {target}: {weights} of {metadata['trainer']}, {sides}, {args.precision}{size}")
    return 0


def _save(facts: dict[str, Any]) -> str:
    size = _size_of(facts["size_bytes"])
    average = ", with the average of the weights" if facts["has_average"] else ""
    return f"{facts['name']}, iteration {facts['iterations']:,}{size}{average}"


def _backup(facts: dict[str, Any]) -> str:
    if not facts["backup"]:
        return "none yet"
    path = str(Path(facts["path"]) / facts["backup"]["name"])
    return _copied(path, facts, _save(facts["backup"]))


def _copied(path: str, facts: dict[str, Any], words: str = "") -> str:
    """A backup or snapshot, and whether damage to a save can reach it."""
    how = "hard links to a save, not a copy" if path in facts["linked"] else "a copy"
    return f"{words or path}, {how}"


def _session(facts: dict[str, Any]) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["started"]))
    unit = plural(facts["iterations"], "iteration")
    return (
        f"{facts['number']}, begun {started}, batch size {facts['batch_size']}, "
        f"{facts['iterations']:,} {unit}{', in faceswap' if facts['is_imported'] else ''}"
    )


def _exports(facts: dict[str, Any]) -> str:
    refused = facts["exports_refused"]
    return ", ".join(facts["exports"]) + (f" alone: {refused}" if refused else "")


def _lowest_loss(facts: dict[str, Any]) -> str:
    own, imported = facts["lowest_mean_loss"], facts["imported_lowest_loss"]
    text = "none yet" if own is None else f"{own:.6g}"
    if imported is not None:
        text += f" ({imported:.6g} before the import, by faceswap's own mean)"
    return text


def _size_of(num_bytes: int) -> str:
    return f", {num_bytes / _MIB:,.1f} MiB" if num_bytes else ""
