"""`docs/settings.md`: every setting in tables. Run: ``make docs``."""

import json

from .. import models
from ..core.config import SECTIONS, Spec, fields_of

_HEAD = """# Settings

Written by `make docs` from `core/config/sections.py`.

A setting is given as `--set section.name=value`, in a file (`--configfile`) whose tables are the
sections, or by its flag. *Locked*: fixed when the model is made. *Free*: may change at every
resume. A flag holds for the session that it is given in, all else for the next ones too; the flags
of what is locked, and those marked *stays*, are kept like all else. What `model.options` may hold:
`mien train -t NAME --options`.
"""


def render() -> str:
    """The page, as Markdown."""
    lines = [_HEAD]
    for section, kind in SECTIONS.items():
        lines += [f"## {section}", "", str(kind.__doc__), ""]
        lines += [
            "| name | default | values | resume | flag | meaning |",
            "| - | - | - | - | - | - |",
        ]
        lines += [_row(spec) for spec in fields_of(kind).values()]
        lines.append("")
    return "\n".join(lines)


def _row(spec: Spec) -> str:
    default = json.dumps(spec.default) if spec.default not in ("", {}, ()) else ""
    flags = " ".join(f"`{flag}`" for flag in (*spec.flags, spec.opposite) if flag)
    flags += " stays" if spec.stays else ""
    lock = "locked" if spec.locked else "free"
    values = ", ".join(models.available()) if spec.name == "trainer" else spec.values
    return f"| {spec.name} | {default} | {values} | {lock} | {flags} | {spec.doc} |"


if __name__ == "__main__":
    print(render(), end="")
