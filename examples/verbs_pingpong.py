"""Two queue pairs play ping-pong: the verbs layer in one page, for those who know it from C."""

import time

import numpy as np

import nopin
from nopin import RecvWr, SendWr, Sge, WrOpcode

ROUNDS = 1000


class Player:
    """A queue pair with a ball of 64 bytes."""

    def __init__(self, device: nopin.Device) -> None:
        self.pd = device.alloc_pd()
        self.cq = device.create_cq(64)
        self.qp = self.pd.create_qp(self.cq)
        self.ball = np.zeros(64, np.uint8)
        self.region = self.pd.register(self.ball, access="l")
        self.sge = Sge(self.region.address, 64, self.region.lkey)

    def hit(self) -> None:
        """Send the ball, and be ready for its return."""
        self.qp.post_recv(RecvWr([self.sge]))
        self.qp.post_send(SendWr(WrOpcode.SEND, [self.sge], flags=nopin.SendFlags.NONE))

    def catch(self) -> None:
        """Wait for the ball."""
        (wc,) = self.cq.wait(timeout=5.0)
        assert wc.status is nopin.WcStatus.SUCCESS, wc


with nopin.Device() as device:
    one, two = Player(device), Player(device)
    one.qp.connect(two.qp.endpoint)
    two.qp.connect(one.qp.endpoint)
    two.qp.post_recv(RecvWr([two.sge]))
    began = time.perf_counter()
    for _ in range(ROUNDS):
        one.hit()
        two.catch()
        two.hit()
        one.catch()
    took_us = (time.perf_counter() - began) * 1e6
    print(f"{ROUNDS} rounds of 64 bytes: {took_us / ROUNDS:.1f} us each")
