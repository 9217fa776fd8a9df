"""The preview's window, with OpenCV's part of it played by a stand-in."""

import types

import cv2
import numpy as np
import pytest

from mien.core.preview import window
from mien.core.preview.window import PreviewWindow


class Screen(types.ModuleType):
    """Windows that only remember; keys come from a list."""

    WINDOW_AUTOSIZE, WND_PROP_VISIBLE = 1, 4

    def __init__(self, codes=()):
        super().__init__("screen")
        self.codes, self.shown, self.names, self.is_visible = list(codes), [], [], True

    def namedWindow(self, name, _flags):
        self.names.append(name)

    def imshow(self, name, image):
        assert name in self.names
        self.shown.append(image)

    def pollKey(self):
        return self.codes.pop(0) if self.codes and self.shown else -1

    def getWindowProperty(self, _name, _property):
        return 1.0 if self.is_visible else -1.0

    def destroyWindow(self, name):
        self.names.remove(name)


@pytest.fixture
def _screen(monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(window, "SECONDS_BETWEEN_LOOKS", 0.0)


@pytest.mark.usefixtures("_screen")
def test_a_picture_is_shown_at_its_scale_and_keys_come_back():
    screen = Screen(codes=[-1, ord("s"), 13, 0x100000 | ord("m"), -1])
    shows = PreviewWindow(screen)
    shows.show(np.zeros((60, 90, 3), np.uint8))
    assert (screen.shown, shows.keys(), shows.is_open) == ([], "", False)
    shows.open(50)
    assert shows.keys() == "", "nothing was shown yet"
    shows.show(np.zeros((60, 90, 3), np.uint8))
    assert [image.shape for image in screen.shown] == [(30, 45, 3)]
    assert [shows.keys() for _ in range(4)] == ["s", "\r", "m", ""]
    shows.open(100)
    assert len(screen.names) == 1, "the next session of the run has the same"
    shows.show(np.zeros((60, 90, 3), np.uint8))
    assert screen.shown[-1].shape == (60, 90, 3)
    shows.close()
    assert (screen.names, shows.is_open) == ([], False)


@pytest.mark.usefixtures("_screen")
def test_a_window_that_the_user_closed_stays_closed():
    screen = Screen(codes=[-1, ord("s")])
    shows = PreviewWindow(screen)
    shows.open(200)
    shows.show(np.zeros((4, 4, 3), np.uint8))
    screen.is_visible = False
    shows.show(np.zeros((4, 4, 3), np.uint8))
    assert len(screen.shown) == 1
    shows.open(200)
    assert (shows.keys(), shows.is_open) == ("", False)
    shows.close()


@pytest.mark.usefixtures("_screen")
def test_an_opencv_without_windows_is_told_with_what_to_install():
    class Headless(Screen):
        def namedWindow(self, _name, _flags):
            raise cv2.error("The function is not implemented. Rebuild the library")

    remedy = (
        r"-m pip uninstall --yes opencv-python-headless && "
        r".* -m pip install '?opencv-python(>=[\d.]+'|)`, or leave --preview out"
    )
    with pytest.raises(ValueError, match=remedy):
        PreviewWindow(Headless()).open(100)


def test_no_screen_is_told(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="needs a screen, and DISPLAY and WAYLAND_DISPLAY are not"):
        PreviewWindow(Screen()).open(100)
