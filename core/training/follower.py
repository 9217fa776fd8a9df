"""The training loop of every rank but the first: the same steps, and what the first one calls for.

It logs, saves, shows and decides nothing.
"""

from dataclasses import replace

from ..distribute.council import Call, Council
from .end import Orders
from .gathering import gather
from .lr_finder import follow_search
from .metrics import peak_memory_mib
from .pacing import Pacing
from .training_setup import StepSetup


class Follower:
    """Drives one session of training on a rank that another one leads.

    Args:
        setup: What is trained, and what trains it.
        council: Agreement with the other ranks.
    """

    def __init__(self, setup: StepSetup, council: Council):
        self.setup, self.council = setup, council
        self.pacing = Pacing(setup.device, council)

    def run(self) -> Orders:
        """Train until the first rank ends the session; what it says of the end.

        Raises:
            RankLost: Another rank has ended.
        """
        # Before any step: the first rank may search for a rate, or end at once.
        orders = self._attend()
        while orders is None:
            self.setup.iterate()
            self.pacing.wait()
            orders = self._meet()
        return orders

    def _meet(self) -> Orders | None:
        iterations = self.setup.state.iterations
        if not self.council.is_due(iterations):
            return None
        # The first rank has the losses of all; here they would only fill the buffer.
        self.setup.step.loss_buffer.clear()
        peak_mib = int(peak_memory_mib(self.setup.device))
        return self._attend() if self.council.meet(iterations, peak_mib=peak_mib) else None

    def _attend(self) -> Orders | None:
        """Do what the first rank calls for, until it has this one go on (None) or end."""
        while True:
            call, _ = self.council.await_call()
            if call == Call.GO_ON:
                return None
            if call == Call.END:
                return Orders.from_json(self.council.group.text())
            if call == Call.GATHER:
                gather(self.setup, self.council.group)
            elif call == Call.SEARCH:
                follow_search(self.setup, self.council)
            elif call == Call.RATE:
                # As text of all digits: another rounding would have the ranks take different steps.
                rate = float(self.council.group.text())
                self.setup.schedule = replace(self.setup.schedule, base_rate=rate, source="found")
