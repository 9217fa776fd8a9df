"""A window that shows the preview, and gives the keys that are pressed in it."""

import os
import time
from types import ModuleType

import cv2
import numpy as np

from ..system.requirements import install_command, requirement, uninstall_command

TITLE = "mien: Enter stop, s save, r renew, m mask, p pause"
SECONDS_BETWEEN_LOOKS = 0.05  # at the keys of the window; chosen, unmeasured


def _install_windows() -> str:
    """Shell command that puts an OpenCV with windows in the place of this one."""
    headless = "opencv-python-headless"
    # First: both write the same folder, and who leaves last would take the files of the other.
    remove = uninstall_command(headless)
    return f"{remove} && {install_command(requirement(headless).replace('-headless', ''))}"


class PreviewWindow:
    """The window of a run, all of whose sessions and pauses share it; for the thread that opens it.

    Args:
        highgui: What has OpenCV's functions for windows.
    """

    def __init__(self, highgui: ModuleType = cv2) -> None:
        self._highgui = highgui
        self._scale = 1.0
        self._looked_at = 0.0
        self._is_opened = self._is_shown = False

    def open(self, scale: int) -> None:
        """Open it, once: one that the user has closed stays closed.

        Args:
            scale: Percent of its size at which a picture is shown.

        Raises:
            ValueError: There is no screen, or this OpenCV has no windows.
        """
        self._scale = scale / 100
        if self._is_opened:
            return
        # Asked before OpenCV is: without a screen Qt ends the whole process instead of raising.
        if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise ValueError(
                "preview.window needs a screen, and DISPLAY and WAYLAND_DISPLAY are not set; leave "
                "--preview out (a resumed model: --set preview.window=false) and look at "
                "preview.png in the model folder. On a screen it needs opencv-python in the place "
                "of opencv-python-headless"
            )
        try:
            self._highgui.namedWindow(TITLE, self._highgui.WINDOW_AUTOSIZE)
        except cv2.error as error:
            raise ValueError(
                "preview.window needs an OpenCV with windows, and this one has none; "
                f"`{_install_windows()}`, or leave --preview out (a resumed model: --set "
                "preview.window=false)"
            ) from error
        self._is_opened = True

    def show(self, image: np.ndarray) -> None:
        """Show a picture, (H, W, 3) BGR uint8; nothing where the window is not open."""
        if not self.is_open:
            return
        smaller = self._scale < 1
        how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        # By us: a window of WINDOW_AUTOSIZE shows each pixel as it is, and has no scale.
        scaled = cv2.resize(image, None, fx=self._scale, fy=self._scale, interpolation=how)
        self._highgui.imshow(TITLE, scaled)
        self._highgui.pollKey()  # draws it
        self._is_shown = True

    def keys(self) -> str:
        """The key pressed since the last look, if any; looks twenty times a second at most."""
        now = time.monotonic()
        if now - self._looked_at < SECONDS_BETWEEN_LOOKS or not self.is_open:
            return ""
        self._looked_at = now
        # Not `waitKey`, which waits a millisecond at least: a step of training.
        code = self._highgui.pollKey()
        # Some toolkits put the state of the modifiers above the lowest byte.
        return chr(code & 0xFF) if code >= 0 else ""

    def close(self) -> None:
        """Take the window away."""
        if self.is_open:
            self._highgui.destroyWindow(TITLE)
        self._is_opened = False

    @property
    def is_open(self) -> bool:
        """Whether it is there; one that was never drawn may not count as visible yet."""
        if not self._is_opened or not self._is_shown:
            return self._is_opened
        visible = self._highgui.getWindowProperty(TITLE, self._highgui.WND_PROP_VISIBLE)
        return bool(visible >= 1)
