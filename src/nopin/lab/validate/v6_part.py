"""V6: page faults of a network interface in an FPGA beside small ARM cores (PART): the other machine.

A transfer is cut into blocks of four pages, of which two may be under way. A page that is absent where it should be
written loses its packets; the interrupt leaves the rest to a deferred task, which pages in what its *scheme* says
(the faulting pages: PIO; the block: PI4; all that is left of the transfer: PIA), tells a process by netlink, and has
the source asked to send again (ERR). A source that hears nothing sends the block again after a timeout. That is
wasteful while the page is still absent, but if many pages are being paged in one after the other, the early ones are
sent meanwhile: with a timeout, paging and transfer overlap.

The link and the deferred task each do one thing at a time; everything else comes from that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from nopin.lab.validate.experiment import Experiment, Parameter, Row, Settings
from nopin.model.effects import Gate, Lane, Pause, Procedure, Work
from nopin.model.scheduler import Scheduler, Timer
from nopin.model.streams import Streams
from nopin.units import PAGE_BYTES, S_NS, US_NS


@dataclass(frozen=True)
class Transfer:
    """One RDMA write; a point of the experiment.

    Attributes:
        scheme: PIO, PI4 or PIA. absent_permille: of its pages, drawn from `seed`.
        timeout_ns: 0: none, the source waits for ERR. errs: ERR is sent.
        given: the parameters of the experiment.
    """

    n_pages: int
    scheme: str
    absent_permille: int = 1000
    timeout_ns: int = 1_000 * US_NS
    errs: bool = True
    seed: int = 0
    given: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Block:
    """Pages of a transfer that are acknowledged together."""

    pages: list[int]
    n_left: int
    n_sendings: int = 0
    timer: Timer | None = None


class _Write:
    """A transfer on its way."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.given = transfer.given
        self.scheduler = Scheduler()
        self.link = Lane("link")
        random = Streams(transfer.seed)["absent"]
        n = transfer.n_pages
        self.absent = {page for page in range(n) if random.randrange(1000) < transfer.absent_permille}
        self.missing = set(range(n))  # at the destination, and for the source to send
        self.page_ns = PAGE_BYTES * 8 * S_NS // self.given["link_bits_per_s"]
        per_block = self.given["block_pages"]
        self.blocks = [
            _Block(pages, len(pages))
            for pages in (list(range(first, min(n, first + per_block))) for first in range(0, n, per_block))
        ]
        self.n_begun = 0
        self.n_acknowledged = 0
        self.end_ns = 0
        self.faulted: list[int] = []
        self.woken: Gate | None = None
        self.stolen_ns = 0
        self.stage_ns: dict[str, int] = {}

    def run(self) -> int:
        """Return the time from the post to the last acknowledgement."""
        self.scheduler.spawn("deferred task", self._deferred_task())
        self.scheduler.call_at(self.given["post_ns"], "post", self._begin_blocks)
        self.scheduler.run(max_steps=10_000_000)
        assert self.n_acknowledged == len(self.blocks), "a block never came through"
        return self.end_ns

    # The source

    def _begin_blocks(self) -> None:
        while self.n_begun < len(self.blocks) and self.n_begun - self.n_acknowledged < self.given["outstanding"]:
            self._send(self.blocks[self.n_begun], self.blocks[self.n_begun].pages)
            self.n_begun += 1

    def _send(self, block: _Block, pages: list[int]) -> None:
        if not block.n_left:
            return
        block.n_sendings += 1
        if block.timer is not None:
            block.timer.cancel()
        for page in pages:
            self.scheduler.spawn(f"page {page}.{block.n_sendings}", self._send_page(block, page), lane=self.link)
        if self.transfer.timeout_ns:
            at_ns = self.scheduler.now_ns + len(pages) * self.page_ns + self.transfer.timeout_ns
            block.timer = self.scheduler.call_at(at_ns, "timeout", lambda: self._send(block, block.pages))

    def _send_page(self, block: _Block, page: int) -> Procedure[None]:
        arrives_ns = self.scheduler.now_ns + self.given["network_ns"]
        self.scheduler.call_at(arrives_ns + self.given["walk_ns"], "translate", lambda: self._translate(block, page))
        yield Work("page on the link", self.page_ns)

    def _acknowledge(self, block: _Block) -> None:
        if block.timer is not None:
            block.timer.cancel()
        self.n_acknowledged += 1
        self.end_ns = self.scheduler.now_ns
        self._begin_blocks()

    # The destination

    def _translate(self, block: _Block, page: int) -> None:
        """The first packet of a page has arrived: the rest of them share its fate."""
        if page in self.absent:
            self._fault(page)
            return
        self.scheduler.call_at(self.scheduler.now_ns + self.page_ns, "written", lambda: self._written(block, page))

    def _written(self, block: _Block, page: int) -> None:
        if page not in self.missing:
            return  # sent twice
        self.missing.remove(page)
        block.n_left -= 1
        if not block.n_left:
            at_ns = self.scheduler.now_ns + self.given["acknowledge_ns"]
            self.scheduler.call_at(at_ns, "acknowledge", lambda: self._acknowledge(block))

    def _fault(self, page: int) -> None:
        self.stolen_ns += self.given["interrupt_ns"]
        if page not in self.faulted:
            self.faulted.append(page)
        if self.woken is not None:
            woken, self.woken = self.woken, None
            self.scheduler.open(woken)

    def _deferred_task(self) -> Procedure[None]:
        while True:
            if not self.faulted:
                self.woken = Gate()
                yield Pause(self.woken)
            yield from self._interrupted("interrupt", 0)
            wanted = self._take_faults()
            yield from self._page_in(wanted)
            yield from self._interrupted("bookkeeping", self.given["bookkeeping_ns"])
            yield from self._interrupted("netlink", self.given["netlink_ns"])
            if not self.transfer.errs:
                self.faulted = [page for page in self.faulted if page in self.absent]
                continue
            yield from self._interrupted("err", self.given["err_ns"])
            self._ask_again(wanted)

    def _interrupted(self, what: str, cost_ns: int) -> Procedure[None]:
        """Work, and what interrupts take meanwhile."""
        before_ns = self.scheduler.now_ns
        yield Work(what, cost_ns)
        while self.stolen_ns:
            stolen_ns, self.stolen_ns = self.stolen_ns, 0
            yield Work("interrupt", stolen_ns)
        self.stage_ns[what] = self.stage_ns.get(what, 0) + self.scheduler.now_ns - before_ns

    def _take_faults(self) -> list[int]:
        """Return the pages that one run of the task brings, by the scheme."""
        first = self.faulted[0]
        size = self.given["block_pages"]
        if self.transfer.scheme == "PIA":
            self.faulted.clear()
            return list(range(first, self.transfer.n_pages))
        index = first // size
        mine = [page for page in self.faulted if page // size == index]
        self.faulted = [page for page in self.faulted if page // size != index]
        return mine if self.transfer.scheme == "PIO" else self.blocks[index].pages

    def _page_in(self, pages: list[int]) -> Procedure[None]:
        absent = [page for page in pages if page in self.absent]
        base_ns, page_ns = self.given["page_in_ns"], self.given["page_in_page_ns"]
        if len(pages) == 1 and absent:
            base_ns = self.given["page_in_one_ns"] - page_ns
        yield from self._interrupted("page in", base_ns + (len(pages) - len(absent)) * self.given["page_present_ns"])
        for page in absent:
            yield from self._interrupted("page in", page_ns)
            self.absent.discard(page)

    def _ask_again(self, pages: list[int]) -> None:
        """ERR: the source sends what it sent before and what has not come, of these pages."""
        self.faulted = [page for page in self.faulted if page in self.absent]
        for block in self.blocks[: self.n_begun]:
            wanted = [page for page in block.pages if page in self.missing and pages[0] <= page <= pages[-1]]
            if wanted and block.n_left:
                at_ns = self.scheduler.now_ns + self.given["resend_ns"]
                self.scheduler.call_at(at_ns, "resend", partial(self._send, block, wanted))


def run_transfer(transfer: Transfer) -> int:
    """Return the latency of a transfer, in nanoseconds."""
    return _Write(transfer).run()


_SIZES = (1, 4, 16, 64, 256, 1024)
_SCHEMES = ("PIO", "PI4", "PIA")


def _size(n_pages: int) -> str:
    n_kib = n_pages * PAGE_BYTES >> 10
    return f"{n_kib} KB" if n_kib < 1024 else f"{n_kib >> 10} MB"


def _run(settings: Settings) -> list[Row]:
    given = {name: settings.integer(name) for name in settings.values}
    given["link_bits_per_s"] = settings.costs.line_rate_bits_per_s
    drawn: dict[str, list[Transfer]] = {}

    def add(label: str, transfer: Transfer) -> None:
        drawn[label] = [transfer]

    for name, timeout_us, errs in (("ERR", 1_000, True), ("timeout 100", 100, False), ("timeout 1000", 1_000, False)):
        add(f"a: 4 KB absent, {name}", Transfer(1, "PIO", timeout_ns=timeout_us * US_NS, errs=errs, given=given))
    for n in _SIZES:
        add(f"b: {_size(n)} no fault", Transfer(n, "PIO", 0, given=given))
        for scheme in _SCHEMES:
            add(f"b: {_size(n)} {scheme}", Transfer(n, scheme, given=given))
    for percent in (1, 5, 20, 40, 80):
        for n in _SIZES:
            for scheme in ("PIO", "PIA"):
                drawn[f"c: {_size(n)} {percent} % absent {scheme}"] = [
                    Transfer(n, scheme, percent * 10, seed=1000 * settings.seed + at, given=given)
                    for at in range(min(settings.integer("draws"), max(5, 1024 // n)))
                ]
    for n in _SIZES:
        for timeout_us in (100, 500, 1_000, 0):
            name = f"timeout {timeout_us}" if timeout_us else "NTO"
            add(f"d: {_size(n)} PIA {name}", Transfer(n, "PIA", timeout_ns=timeout_us * US_NS, given=given))
    came = iter(settings.map(run_transfer, [each for transfers in drawn.values() for each in transfers]))
    took = {label: sum(next(came) for _ in transfers) / len(transfers) / US_NS for label, transfers in drawn.items()}
    return [
        *_stages(given),
        *(Row(label, "us", value) for label, value in took.items()),
        *_before(settings, took),
        *(
            Row(f"d: {_size(n)} speed-up of timeout {us}", "", took[f"d: {_size(n)} PIA NTO"] / took[label])
            for n in _SIZES
            for us in (100, 500, 1_000)
            if (label := f"d: {_size(n)} PIA timeout {us}")
        ),
        Row("d: speed-up, limit for many pages", "", _limit(given)),
    ]


def _stages(given: dict[str, int]) -> list[Row]:
    write = _Write(Transfer(1, "PIO", given=given))
    write.run()
    first = given["post_ns"] + given["network_ns"]
    stages = {"post to first packet": first, "walk": given["walk_ns"], **write.stage_ns}
    return [Row(f"a: stage {name}", "us", value / US_NS) for name, value in stages.items()]


def _before(settings: Settings, took: dict[str, float]) -> list[Row]:
    """Touching or pinning before the transfer, instead of faulting in it."""
    rows = []
    for n in _SIZES:
        clean = took[f"b: {_size(n)} no fault"]
        touch_us = n * settings["touch_ns"] / US_NS
        pin_us = (settings["mlock_ns"] + n * settings["mlock_page_ns"]) / US_NS
        rows.append(Row(f"b: {_size(n)} touched first", "us", clean + touch_us))
        rows.append(Row(f"b: {_size(n)} pinned first", "us", clean + pin_us))
    return rows


def _limit(given: dict[str, int]) -> float:
    """Return the speed-up of overlapping over serial for many pages: each page costs the longer part, not both."""
    link_ns, in_ns = PAGE_BYTES * 8 * S_NS // given["link_bits_per_s"], given["page_in_page_ns"]
    return (link_ns + in_ns) / max(link_ns, in_ns)


_PART = "PART, TPDS'22"

EXPERIMENT = Experiment(
    name="V6",
    title="PART: page faults of an FPGA's network interface",
    machine="part_arm_fpga",
    source="Psistakis et al., TPDS'22 [P]",
    run=_run,
    parameters={
        "post_ns": Parameter(3_000, "ns", "P", f"{_PART}: a co-processor issues the transfer"),
        "network_ns": Parameter(1_000, "ns", "P", f"{_PART}: network and engines, first packet"),
        "walk_ns": Parameter(600, "ns", "P", f"{_PART}: SMMU walk; sixteen at once, so none waits"),
        "interrupt_ns": Parameter(1_000, "ns", "P", _PART),
        "page_in_ns": Parameter(6_000, "ns", "P", f"{_PART}: 6 + 3n"),
        "page_in_page_ns": Parameter(3_000, "ns", "P", f"{_PART}: 6 + 3n"),
        "page_in_one_ns": Parameter(8_000, "ns", "P", f"{_PART}: measured for a single page"),
        "page_present_ns": Parameter(100, "ns", "P", f"{_PART}: a page that is there"),
        "netlink_ns": Parameter(7_000, "ns", "P", _PART),
        "bookkeeping_ns": Parameter(4_000, "ns", "P", _PART),
        "err_ns": Parameter(1_000, "ns", "P", _PART),
        "resend_ns": Parameter(
            1_100, "ns", "D", "a page alone takes 6: less 3.3 on the link, 1 of network, 0.6 of walk"
        ),
        "acknowledge_ns": Parameter(300, "ns", "D", "two hops of 0.15"),
        "block_pages": Parameter(4, "", "P", _PART),
        "outstanding": Parameter(2, "", "P", f"{_PART}: blocks of a transfer"),
        "draws": Parameter(200, "", "X", "of which pages are absent, at most, for the mean of (c)"),
        "touch_ns": Parameter(3_000, "ns", "P", f"{_PART}: a CPU touches an absent page"),
        "mlock_ns": Parameter(3_000, "ns", "D", "mlock adds 6 for one absent page, of which 3 page it in"),
        "mlock_page_ns": Parameter(3_000, "ns", "X", "as page-in by get_user_pages"),
    },
    missing="context switches between the deferred task and the process that netlink tells, outside the listed stages",
)
