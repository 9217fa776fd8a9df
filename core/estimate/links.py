"""Links between a GPU and its host, and between GPUs: how many bytes a second they carry.

What the system says of a link is its speed on paper; of that the copies of a GPU reach the share
that is counted here. Nothing is measured; `mien bench scaling` does that.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...kernels import toolkit

_PCI_DEVICES = Path("/sys/bus/pci/devices")
_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}  # of PCIe, by GT/s of a lane
_PCIE_GB_S = 25 / 256
"""GB/s of one way of PCIe that copies reach, by GT/s and lane: 25 of 32 GB/s with 16 lanes of
PCIe 4. Engineering figure, unmeasured by mien."""

_NVLINK_GB_S = 25.0
"""GB/s of one way of one NVLink, of generations 3 and 4, as advertised; an H100 has 18."""


@dataclass(frozen=True)
class Link:
    """A way for bytes, the same in both directions."""

    name: str
    gb_s: float
    """GB/s of one direction."""

    source: str = "assumed"
    """How the figure is known: assumed, told by the system, or measured."""

    is_beside: bool = True
    """Whether an exchange can run beside the computation; that of CPUs takes their cores."""

    divides_cores: bool = False
    """Whether it is between processes that divide the cores which one alone would have all of."""

    def __str__(self) -> str:
        return self.name if self.source != "assumed" else f"{self.name} (assumed)"


NVLINK = Link("NVLink", 450.0)
C2C = Link("NVLink-C2C", 450.0)
PCIE_5 = Link("PCIe 5", 50.0)
PCIE_4 = Link("PCIe 4", 25.0)
THROUGH_HOST = Link("PCIe 4 through the host", 18.75)
"""Link of GPUs that may not read one another's memory, as most of those for games."""

NETWORK = Link("the network", 12.5)
"""Link between machines: 100 Gbit/s."""

LOOPBACK = Link("gloo on this machine", 1.0, is_beside=False, divides_cores=True)
"""Link between processes that train on CPUs."""


def host_link(number: int = 0) -> Link:
    """The link between a GPU and the host, as the system tells it; where it does not, PCIe 4.

    Args:
        number: Number of the GPU among those that CUDA_VISIBLE_DEVICES leaves.
    """
    cards = toolkit.cards()
    # Grace with Hopper or Blackwell: its link is no PCIe device that the system lists.
    if number < len(cards) and re.search(r"\bG[HB]\d", cards[number].name):
        return Link(C2C.name, C2C.gb_s, "told")
    address = toolkit.pci_address(number)
    told = pcie_link(_PCI_DEVICES / address) if address else None
    return told or PCIE_4


def pcie_link(device: Path) -> Link | None:
    """The PCIe link of a device in /sys/bus/pci/devices; None where nothing tells it."""
    try:
        speed = (device / "max_link_speed").read_text()
        lanes = int((device / "max_link_width").read_text())
        gt_s = float(speed.split()[0])
    except (OSError, ValueError, IndexError):
        return None
    # A virtual machine may show any number; then the assumed link is nearer to the truth.
    if gt_s not in _GENERATIONS or not 0 < lanes <= 32:
        return None
    name = f"PCIe {_GENERATIONS[gt_s]}" + (f" x{lanes}" if lanes != 16 else "")
    return Link(name, gt_s * lanes * _PCIE_GB_S, "told")


def gpu_link() -> Link:
    """The slowest link between GPUs of this machine, as nvidia-smi tells it; where it does not, or
    there is one GPU, that between the first one and the host."""
    host = host_link()
    if shutil.which("nvidia-smi") is None:
        return host
    command = ["nvidia-smi", "topo", "-m"]
    # Not checked: a driver that fails tells no topology, and that is the answer.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return slowest_of(done.stdout, host)


def slowest_of(topology: str, host: Link) -> Link:
    """The slowest link in the table that `nvidia-smi topo -m` prints.

    Args:
        topology: The table: of each GPU a row, with NV and the number of NVLinks, or a word for a
            way over PCIe.
        host: Link to the host, which counts where the way is over PCIe, or nothing is told.
    """
    # nvidia-smi underlines its header by escapes, which may stand before the first row.
    rows = re.findall(r"^(?:\x1b\[\d*m)*GPU\d+\s+(.*)$", topology, re.MULTILINE)
    cells = [cell for row in rows for cell in row.split()[: len(rows)] if cell != "X"]
    numbers = [re.fullmatch(r"NV(\d+)", cell) for cell in cells]
    counts = [int(number[1]) for number in numbers if number]
    # One pair without NVLink is enough: an exchange in a ring goes over the slowest link.
    if not counts or len(counts) < len(cells):
        return host
    return Link(NVLINK.name, _NVLINK_GB_S * min(counts), "told")
