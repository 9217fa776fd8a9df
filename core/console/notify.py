"""Notifications: a command or a message to a phone or chat, where nobody watches the terminal.

Told are the end of a run, however it came, a stage that is over (as by a plateau), a rollback after
a divergence and a failure of mien itself. Nothing leaves the machine unless a start says where to:
no model folder can. Messages are sent by Apprise, which knows ntfy, Discord, Slack, mail and a
hundred others by one URL.

Training never waits for it: a thread sends, and the end of the program waits for the last message
for some seconds.
"""

import os
import signal
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from ..config import NotifyConfig
from ..system.requirements import install_command
from .report import Report

TIMEOUT_S = 30.0
"""Seconds after which a command is ended. Chosen: a mail may take as long, no webhook does."""

_LAST_WAIT_S = 10.0  # what a scheduler grants after SIGTERM is often 30 s, most of it for the save


class Notifier:
    """Tells the user of the events of one run.

    Args:
        settings: Command and URL.
        model_dir: Folder of the model, whose name stands before each message.

    Raises:
        ValueError: The URL is of no known kind, or Apprise is not installed.
    """

    def __init__(self, settings: NotifyConfig, model_dir: Path) -> None:
        self.settings, self.model_dir = settings, model_dir
        self._service = _service_of(settings.url) if settings.url else None
        # One thread, so that messages arrive in the order of the events.
        self._worker = ThreadPoolExecutor(1, "mien-notify")
        self._sent: list[Future[str]] = []
        self._command: subprocess.Popen[str] | None = None
        """The command that was begun last."""

    def tell(self, report: Report) -> None:
        """Send a report; returns at once."""
        if self.settings.command:
            self._sent.append(self._worker.submit(self._run, report))
        if self._service is not None:
            self._sent.append(self._worker.submit(self._send, report))

    def close(self) -> list[str]:
        """Wait some seconds for what is being sent; what could not be, a line each."""
        # All together: each by itself could hold up the end as often as there are messages.
        late = wait(self._sent, _LAST_WAIT_S).not_done
        self._worker.shutdown(wait=False, cancel_futures=True)
        # Python waits for the thread before the process may end, and the thread for the command.
        if self._command is not None:
            _end(self._command)
        problems = [sent.result() for sent in self._sent if sent not in late]
        problems += [f"no answer within {_LAST_WAIT_S:.0f} s" for _ in late]
        return [f"a notification was not sent: {problem}" for problem in problems if problem]

    def _run(self, report: Report) -> str:
        """Run the command; what went wrong."""
        about = {
            "MIEN_EVENT": report.event,
            "MIEN_TEXT": report.text,
            "MIEN_MODEL_DIR": str(self.model_dir),
        }
        try:
            self._command = command = subprocess.Popen(
                self.settings.command,
                # By a shell: the line is the user's own, and comes from no model folder.
                shell=True,
                # With all that the shell starts, so that all of it can be ended.
                start_new_session=True,
                env=os.environ | about,
                stdin=subprocess.PIPE,
                # Not to the output of the run, where a program may read JSON lines.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            with command:
                try:
                    _, said = command.communicate(report.line + "\n", TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    _end(command)
                    return f"notify.command took more than {TIMEOUT_S:.0f} s"
        except OSError as error:
            return f"notify.command: {error.strerror or error}"
        if command.returncode:
            # The last line: programs say last what has stopped them.
            last = said.strip().rpartition("\n")[2]
            return f"notify.command ended with {command.returncode}" + (f": {last}" if last else "")
        return ""

    def _send(self, report: Report) -> str:
        """Send the message; what went wrong. The URL stays untold: it may hold a password."""
        assert self._service is not None  # else nothing is handed to the thread
        # The name and not the path, which would tell a chat about the user's folders.
        title = f"mien: {self.model_dir.name}"
        is_sent = self._service.notify(title=title, body=report.text)
        return "" if is_sent else "the service of notify.url did not take it"


def _end(command: subprocess.Popen[str]) -> None:
    """End a command that has not ended, with all that it has started."""
    if command.poll() is None:
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(command.pid, signal.SIGKILL)


def _service_of(url: str):
    """What sends to this URL."""
    try:
        # Here: it is an extra, which a run without a URL does not need.
        from apprise import Apprise
    except ImportError:
        raise ValueError(
            "notify.url needs Apprise, which is not installed; install it with "
            f"`{install_command('mien[notify]')}`, or use notify.command"
        ) from None
    service = Apprise()
    if not service.add(url):
        raise ValueError(
            "notify.url is of no known kind; it begins with ntfys://, discord://, json:// or "
            "another of https://github.com/caronc/apprise"
        )
    return service
