"""The menu of settings that are changed from the keyboard while training goes on.

It takes keys as they come and never waits, so that training does not wait for it either.
"""

from collections.abc import Callable, Mapping

_ESCAPE, _BACKSPACES = "\x1b", "\x7f\b"
_MOST_LETTERS = 200


class SettingsMenu:
    """Choose a setting, type its value, Enter; Esc leaves.

    Args:
        values: The value of each setting, in words; the main ones first.
        num_main: Number of those that are listed; the others are chosen by their names.
        write: Prints a line.
        prompt: Shows what is being typed; an empty text when nothing is.
    """

    def __init__(
        self,
        values: Mapping[str, str],
        num_main: int,
        *,
        write: Callable[[str], None],
        prompt: Callable[[str], None],
    ) -> None:
        self._values, self._main = values, tuple(values)[:num_main]
        self._write, self._prompt = write, prompt
        self.is_open = False
        self._name = ""
        """Setting whose value is being typed; empty where one is being chosen."""

        self._typed = ""

    def open(self) -> None:
        """List the main settings and have one chosen."""
        self.is_open, self._name, self._typed = True, "", ""
        for number, name in enumerate(self._main, 1):
            self._write(f"{number}  {name} = {self._values[name]}")
        self._show()

    def ask_again(self, name: str) -> None:
        """Have the value of a setting typed again, after one that was refused.

        Args:
            name: Full name of the setting; one that is not in the menu leaves it as it is.
        """
        if name in self._values:
            self.is_open, self._name, self._typed = True, name, ""
            self._show()

    def close(self) -> None:
        """Leave the menu; nothing is changed."""
        self.is_open = False
        self._prompt("")

    def press(self, keys: str) -> list[str]:
        """Take in keys; the changes that were entered, as ``section.key=value``."""
        changes = []
        for key in keys:
            if key == _ESCAPE:
                self.close()
            # Enter is a line feed on a terminal, and a carriage return in a window.
            elif key in "\r\n":
                changes += self._enter()
            elif key in _BACKSPACES:
                self._typed = self._typed[:-1]
            elif key.isprintable() and len(self._typed) < _MOST_LETTERS:
                self._typed += key
            if not self.is_open:
                break  # what was typed ahead was meant for the menu
            self._show()
        return changes

    def _enter(self) -> list[str]:
        """Take what was typed as the name of a setting, or as its value."""
        typed, self._typed = self._typed.strip(), ""
        if not typed:
            self.close()
        elif self._name:
            self.close()
            # One change, which ends the session: the next one has a menu of its own.
            return [f"{self._name}={typed}"]
        else:
            self._choose(typed)
        return []

    def _choose(self, word: str) -> None:
        """Take a number of the list, or a name or a part of it that only one setting has."""
        if word.isdecimal() and 1 <= int(word) <= len(self._main):
            self._name = self._main[int(word) - 1]
            return
        # A whole name first: it may be a part of others.
        found = [word] if word in self._values else [name for name in self._values if word in name]
        if len(found) == 1:
            self._name = found[0]
        elif found:
            self._write(f"{word} may be {', '.join(found)}")
        else:
            self._write(f"no setting that can be changed now has {word} in its name")

    def _show(self) -> None:
        what = f"{self._name} = {self._values[self._name]}, new value" if self._name else "Setting"
        how = "Enter, Esc leaves" if self._name else "number or name, Enter; Esc leaves"
        self._prompt(f"{what} ({how}): {self._typed}_")
