"""Advice that names flags of the command line, in the words of a program that has none."""

import functools
import re

from .settings import Spec, all_settings

_NO_VALUES = "out|and|or|to"
"""Words that may follow a flag and are no value of it, as in "leave --preview out"."""


def without_flags(text: str) -> str:
    """A text with the names of settings in the place of their flags: "train.batch_size=26" for
    "--batch-size 26", "save.logs=false" for "--no-logs". Flags that are no settings stay."""
    text = re.sub(r"--set (?=[a-z]+\.)", "", text)
    text = text.replace("--recipe none", 'recipe="none"')
    return _flag_and_value().sub(_as_setting, text)


@functools.cache
def _by_flag() -> dict[str, Spec]:
    """Settings by their long flags and the opposites of these."""
    found: dict[str, Spec] = {}
    for spec in all_settings():
        # Of these Python takes none; what names them speaks of the command.
        if spec.section != "distribute":
            flags = [flag for flag in (*spec.flags, spec.opposite) if flag.startswith("--")]
            found |= dict.fromkeys(flags, spec)
    return found


@functools.cache
def _flag_and_value() -> re.Pattern[str]:
    flags = "|".join(map(re.escape, sorted(_by_flag(), key=len, reverse=True)))
    return re.compile(rf"(?<![\w-])({flags})(?![\w-])(?: (?!(?:{_NO_VALUES})\b)([\w./:]*\w))?")


def _as_setting(match: re.Match[str]) -> str:
    flag, value = match.groups()
    spec = _by_flag()[flag]
    if spec.type is bool:
        # What follows a switch is the sentence.
        rest = "" if value is None else f" {value}"
        return spec.full_name + ("=false" if flag.startswith("--no-") else "") + rest
    return spec.full_name if value is None else f"{spec.full_name}={value}"
