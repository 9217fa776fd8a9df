"""Free settings changed while training goes on, and pauses.

A change ends the session with a save, and the next one opens with it, as after a stop and a start
with `--set`: the model keeps it. What would be refused at that start is refused here, in one line,
and training goes on as it was. A pause ends the session as well; what follows it opens all anew.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.left_request import take_left_requests
from ..config import Config, Spec, from_dict, merge, nested, to_dict
from ..config.live import MAIN_SETTINGS, live_settings, live_values, parse_change
from ..console.outcome import Outcome
from ..console.reporter import Reporter
from ..console.requests import HELP, Request, Requests, changes_among, requests_among
from ..console.settings_menu import SettingsMenu
from ..distribute.ranks import ALONE
from ..losses.weighted import Loss
from .build import check_step, sizes_of
from .end import Change, End
from .training_setup import TrainingSetup


@dataclass(frozen=True)
class _Wish:
    """A change as somebody has asked for it."""

    text: str
    """Setting and value, as ``section.key=value``."""

    by: str
    """Source of it: keyboard or page."""


class Steering:
    """Takes the changes that the user asks for, and ends the session for them.

    Args:
        setup: What is trained.
        reporter: Shows the keys and the menu, and says what is refused.
        requests: Requests of the user.
    """

    def __init__(self, setup: TrainingSetup, reporter: Reporter, requests: Requests) -> None:
        self.setup, self.reporter, self.requests = setup, reporter, requests
        self.end: End | None = None
        """How the session ends for what was asked; None: it goes on."""

        specs = live_settings()
        values = {
            name: specs[name].written(value) for name, value in live_values(setup.config).items()
        }
        main = {name: values[name] for name in MAIN_SETTINGS}
        requests.echo = reporter.say
        menu = SettingsMenu(main | values, len(main), write=reporter.say, prompt=reporter.prompt)
        reporter.prompt("")  # the menu of the session before may have been open
        requests.begin_session(
            menu if reporter.has_status_line else None,
            # Ctrl-Z has stopped the other ranks already, which a save would wait for.
            can_suspend=setup.council is None,
        )
        reporter.hint("? keys" if requests.has_keyboard else "")

    def take(self, requests: set[Request]) -> set[Request]:
        """Take in requests; those that are left to others."""
        wishes = [_Wish(text, "keyboard") for text in self.requests.take_changes()]
        wishes += [_Wish(text, "page") for text in self.requests.take_left_in_pause()]
        if "keys" in requests:
            self.reporter.say(HELP)
        if "look" in requests:
            left = take_left_requests(self.setup.folder.path)
            wishes += [_Wish(text, "page") for text in changes_among(left)]
            requests |= requests_among(left)
        self._change(wishes)
        if "pause" in requests:
            self._pause()
        return requests - {"keys", "look", "pause"}

    def tell_unmade(self, end: End) -> None:
        """Name the changes that came too late, where the session has ended in another way.

        Args:
            end: How it has ended.
        """
        if self.end is None or end is self.end:
            return
        warn_unmade(assignments_of(self.end.changes), self.reporter)

    def _pause(self) -> None:
        """End the session for a pause."""
        self.requests.begin_pause()
        # A change of the same step is made when the pause is over.
        self.end = replace(self.end or _next_session(), pauses=True)

    def _change(self, wishes: list[_Wish]) -> None:
        """End the session for the changes that can be made."""
        changes: list[Change] = []
        refused_key_input = ""
        config = self.setup.config
        for wish in wishes:
            try:
                spec, value = parse_change(wish.text)
                changed = self._checked(spec, value, config)
            except ValueError as error:
                self.reporter.warning(f"nothing was changed: {error}")
                if wish.by == "keyboard":
                    refused_key_input = wish.text.partition("=")[0]
                continue
            old = spec.of(config)
            if value == old:
                self.reporter.say(f"{spec.full_name} is {spec.written(old)} already")
                continue
            changes.append(Change(spec.section, spec.name, old, value, wish.by))
            # The next one is checked with it: two changes may clash that would each do alone.
            config = changed
        if changes:
            self.end = replace(_next_session(), changes=tuple(changes))
        # Else the keys of the value that is typed next would be commands, and its Enter the end.
        elif refused_key_input and self.requests.menu is not None:
            self.requests.menu.ask_again(refused_key_input)

    def _checked(self, spec: Spec, value: Any, config: Config) -> Config:
        """The settings with a change, which the next session could open with; else ValueError."""
        setup = self.setup
        stage = setup.progress.settings() if setup.progress else {}
        # What a stage sets weighs more: the change would come to nothing without a word.
        if spec.name in stage.get(spec.section, {}):
            raise ValueError(
                f"{spec.full_name} is set by the stages of the recipe; change it there, or leave "
                "the recipe with --recipe none"
            )
        changed = from_dict(merge(to_dict(config), nested({spec.place: value})))
        check_step(changed, setup.device, setup.council.ranks if setup.council else ALONE)
        if changed.loss != config.loss:
            # On the CPU, and thrown away: it is made for its refusals.
            Loss(changed.loss, sizes_of(config)[1], "cpu")
        return changed


def _next_session() -> End:
    """End of a session that the next one follows."""
    return End(Outcome.STOPPED, "", goes_on=True)


def assignments_of(changes: Iterable[Change]) -> list[str]:
    """Changes as `--set` takes them."""
    specs = live_settings()
    names = ((change.full_name, change.new) for change in changes)
    return [f"{name}={specs[name].written(value)}" for name, value in names]


def warn_unmade(assignments: Iterable[str], reporter: Reporter) -> None:
    """Name changes, as `--set` takes them, that were asked for and came too late."""
    for assignment in assignments:
        name, _, value = (part.strip() for part in assignment.partition("="))
        reporter.warning(
            f"{name} was not changed, as the session ended first; start again with "
            f"--set {name}={value}"
        )
