"""Links as the system tells them, and what is assumed where it does not."""

import pytest

from mien.core.estimate import links
from mien.kernels import toolkit

NVLINK_TABLE = """
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tNV18\tPIX\t0-47\t0
GPU1\tNV18\t X \tNV12\tNODE\t0-47\t0
GPU2\tNV18\tNV12\t X \tSYS\t0-47\t0
NIC0\tPIX\tNODE\tSYS\t X \t\t
"""


def _device(folder, speed, width):
    folder.mkdir()
    (folder / "max_link_speed").write_text(f"{speed}\n")
    (folder / "max_link_width").write_text(f"{width}\n")
    return folder


@pytest.mark.parametrize(
    ("speed", "width", "name", "gb_s"),
    [
        ("16.0 GT/s PCIe", "16", "PCIe 4", 25),
        ("32.0 GT/s PCIe", "16", "PCIe 5", 50),
        ("8 GT/s", "8", "PCIe 3 x8", 6.25),
    ],
)
def test_a_pcie_link_is_read_from_the_system(tmp_path, speed, width, name, gb_s):
    link = links.pcie_link(_device(tmp_path / "0000:3b:00.0", speed, width))
    assert (link.name, link.gb_s, str(link)) == (name, gb_s, name)


@pytest.mark.parametrize(
    ("speed", "width"),
    [("Unknown", "16"), ("16.0 GT/s", "0"), ("16.0 GT/s", "255"), ("", "16"), ("17 GT/s", "16")],
)
def test_what_tells_no_link_is_none(tmp_path, speed, width):
    assert links.pcie_link(_device(tmp_path / "gpu", speed, width)) is None
    assert links.pcie_link(tmp_path / "absent") is None


def test_the_link_of_a_gpu_to_its_host(tmp_path, monkeypatch):
    _device(tmp_path / "0000:3b:00.0", "32.0 GT/s PCIe", "16")
    monkeypatch.setattr(links, "_PCI_DEVICES", tmp_path)
    monkeypatch.setattr(toolkit, "cards", lambda: (toolkit.Card("NVIDIA H100 80GB HBM3", 90),))
    monkeypatch.setattr(toolkit, "pci_address", lambda number: "0000:3b:00.0")
    assert str(links.host_link()) == "PCIe 5"
    monkeypatch.setattr(toolkit, "pci_address", lambda number: "")
    assert str(links.host_link()) == "PCIe 4 (assumed)"
    monkeypatch.setattr(toolkit, "cards", lambda: (toolkit.Card("NVIDIA GH200 480GB", 90),))
    assert links.host_link().name == "NVLink-C2C"


def test_the_slowest_link_between_gpus_counts():
    assert links.slowest_of(NVLINK_TABLE, links.PCIE_5) == links.Link("NVLink", 300.0, "told")
    mixed = NVLINK_TABLE.replace("GPU1\tNV18", "GPU1\tSYS")
    assert links.slowest_of(mixed, links.PCIE_5) == links.PCIE_5
    for nothing in ("", "GPU0\t X \t0-47\t0\n", "no such command"):
        assert links.slowest_of(nothing, links.PCIE_4) == links.PCIE_4
