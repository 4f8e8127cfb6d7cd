"""A remote array of a modelled process: operations on a share, through all connections that it takes.

The counterpart of `verbs.attachment`, without threads: whoever waits for an operation makes progress, and a task
attaches again when the connection has broken. What is repeated then, and in which order, `control.mending` decides,
here as there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from nopin.control.exchange import NONCE_BYTES, Attach, Attached, Denied, proof_of
from nopin.control.mending import MAY_MEAN_GONE, Mending, gone, is_final, is_mendable, is_same_array
from nopin.errors import AttachRefused, NopinError, PeerError, RegionGone, ServerGone, WorkError
from nopin.mm.effects import Backoff, Gate, Pause
from nopin.model.effects import Procedure, Work
from nopin.model.host.process import Process
from nopin.model.net.client import bring_up
from nopin.model.net.nic_host import HostClient, NicHost
from nopin.model.net.server import Line, Server
from nopin.model.scheduler import Scheduler
from nopin.nic.abi import QpState, WcStatus, WrOpcode
from nopin.nic.attributes import QpAttr
from nopin.nic.mr import Region
from nopin.nic.wire.batch import Endpoint
from nopin.ranges import Range
from nopin.units import MS_NS

PSN = 0xFFFFF0
MAX_RD_ATOMIC = 4
PAUSE_NS = 5 * MS_NS
GRACE_NS = 50 * MS_NS
"""How long the owner's word may take that says why an access was refused."""


@dataclass(eq=False)
class Operation:
    """One transfer or atomic. Addresses are offsets in the share.

    Attributes:
        error: why it failed, once it has ended; None: it is done.
    """

    opcode: WrOpcode
    local: int
    length: int
    offset: int
    add: int
    serial: int
    n_posted: int = 0
    ended: bool = False
    error: NopinError | None = None

    def end(self, error: NopinError | None = None) -> None:
        """Say what it came to."""
        assert not self.ended, "an operation that ends twice"
        self.ended, self.error = True, error


@dataclass(eq=False)
class Connection:
    """A queue pair of ours with one of the owner's server, and the connection they live by.

    Attributes:
        region: our buffer.
        under_way: posted, oldest first.
        dead: it ended.
    """

    nic: NicHost
    client: HostClient
    line: Line
    told: Attached
    region: Region
    under_way: deque[Operation] = field(default_factory=deque)
    dead: bool = False


class AttachedArray:
    """See above.

    Args:
        home: the server of our process, whichever it is.
        owner: the server where the share is.
        name, token: of the share.
        buffer: of our process: where operations have their bytes.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        process: Process,
        home: Server,
        owner: Server,
        name: str,
        token: bytes,
        buffer: Range,
    ) -> None:
        self._scheduler = scheduler
        self._process = process
        self._home = home
        self._owner = owner
        self._name = name
        self._token = token
        self._buffer = buffer
        self._mending: Mending[Operation] = Mending()
        self._connection: Connection | None = None
        self._gate: Gate | None = None
        self._n_operations = 0
        self._n_lines = 0

    def attach(self) -> Procedure[None]:
        """Connect for the first time.

        Raises:
            AttachRefused, PeerError, ServerGone: it cannot be attached.
        """
        self._connection = yield from self._connect(0)

    def cut_off(self) -> None:
        """Have the network between us and the owner's server be cut, and mended. Requires: it is attached."""
        assert self._connection is not None
        self._connection.line.cut()

    def submit(self, opcode: WrOpcode, local: int, length: int, offset: int, *, add: int = 0) -> Operation:
        """Start an operation.

        Raises:
            NopinError: the attachment has ended.
        """
        if self._mending.dead is not None:
            raise self._mending.dead
        self._n_operations += 1
        operation = Operation(opcode, local, length, offset, add, self._n_operations)
        connection = self._connection
        assert connection is not None, "it is attached first"
        if connection.dead:
            self._mending.hold([operation])
        else:
            self._post(connection, operation)
        return operation

    def drive(self, operation: Operation) -> Procedure[None]:
        """Make progress until an operation has ended."""
        while not operation.ended:
            yield from self._look()
            if operation.ended:
                return
            self._gate = Gate()
            yield Pause(self._gate)

    # Progress

    def _wake(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            self._scheduler.open(gate)

    def _look(self) -> Procedure[None]:
        """Take note of completions, and of what connections have told."""
        connection = self._connection
        if connection is None or connection.dead:
            return
        for _, status in connection.client.client.poll():
            if status is not WcStatus.SUCCESS:
                yield from self._failed(connection, status)
                return
            connection.under_way.popleft().end()
        if connection.line.cause:
            if self._home.is_run_by(connection.nic):
                stop = QpAttr(state=QpState.ERR)
                connection.nic.nic.modify_qp(connection.client.client.qp, stop, self._scheduler.now_ns)
            self._die(connection, gone(connection.line.cause, "an operation"))
        elif not self._home.is_run_by(connection.nic):
            self._die(connection, ServerGone(f"the server at {self._home.name} went away"))

    def _failed(self, connection: Connection, status: WcStatus) -> Procedure[None]:
        """The first error ends the connection; perhaps the owner's server says why."""
        if status in MAY_MEAN_GONE and not connection.line.cause:
            yield Backoff(GRACE_NS)
        if connection.dead:
            return
        if status in MAY_MEAN_GONE and connection.line.cause:
            self._die(connection, gone(connection.line.cause, "an operation"))
            return
        connection.under_way.popleft().end(WorkError(f"an operation failed: {status.name}", status=status))
        flushed = WorkError("an earlier operation ended this connection", status=WcStatus.WR_FLUSH_ERR)
        self._die(connection, flushed)

    def _die(self, connection: Connection, error: NopinError) -> None:
        """End a connection, and sort out what was under way."""
        connection.dead = True
        tasks = list(connection.under_way)
        connection.under_way.clear()
        if not is_mendable(error):
            self._end(error, tasks)
            return
        if self._sort_out(tasks, error):
            self._scheduler.spawn(f"{self._process} attaches again", self._attach_again())

    def _sort_out(self, tasks: list[Operation], error: NopinError) -> bool:
        """Fail what must not be repeated, keep the rest; tell whether mending begins."""
        broken = self._mending.broke(tasks)
        for each in broken.doubtful:
            each.end(RegionGone(f"the connection broke, and nobody knows whether it was carried out ({error})"))
        for each in broken.over:
            each.end(error)
        return broken.begins

    def _end(self, error: NopinError, tasks: list[Operation]) -> None:
        for each in [*tasks, *self._mending.end(error)]:
            each.end(error)
        self._wake()

    def _post(self, connection: Connection, operation: Operation) -> None:
        operation.n_posted = 1
        connection.under_way.append(operation)
        connection.client.post_send(
            operation.opcode,
            [(operation.local, operation.length, connection.region.lkey)],
            remote=connection.told.address + operation.offset,
            rkey=connection.told.rkey,
            compare_add=operation.add,
        )

    # Connecting

    def _attach_again(self) -> Procedure[None]:
        before = self._connection
        assert before is not None
        while self._mending.dead is None:
            try:
                connection = yield from self._connect(before.client.client.qp.qpn)
            except NopinError as problem:
                if is_final(problem):
                    self._end(RegionGone(f"the shared region is gone: {problem}"), [])
                yield Backoff(PAUSE_NS)
                continue
            if not is_same_array(connection.told, before.told):
                self._end(RegionGone("the shared region is gone: another array is there now"), [])
            if (yield from self._go_on_with(connection)):
                self._close(before)
                return
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        """End a connection that is nobody's any more; a NIC that was killed has forgotten its part."""
        connection.line.close()
        connection.nic.drop(connection.client)
        connection.nic.deregister(connection.region)

    def _go_on_with(self, connection: Connection) -> Procedure[bool]:
        """Post again what was under way; False if this connection has ended, too."""
        while self._mending.dead is None and self._is_alive(connection):
            tasks = self._mending.take()
            if not tasks:
                self._connection = connection
                self._wake()
                return True
            for task in tasks:
                self._post(connection, task)
            yield Work("has posted again")
        left, connection.dead = list(connection.under_way), True
        self._sort_out(left, gone(connection.line.cause, "what was posted again"))
        self._wake()
        return False

    def _is_alive(self, connection: Connection) -> bool:
        return not connection.line.cause and self._home.is_run_by(connection.nic)

    def _connect(self, replaces: int) -> Procedure[Connection]:
        """Connect; see `attach` for what it raises."""
        nic = yield from self._home.until_up()
        self._n_lines += 1
        line = Line(self._scheduler, f"line {self._n_lines} of {self._process}")
        client = nic.client(depth=8)
        try:
            told = yield from self._exchange(nic, client, line, replaces)
        except NopinError:
            line.close()
            nic.drop(client)
            raise
        there = Endpoint(told.gid, told.port)
        bring_up(
            client.client,
            there,
            told.qpn,
            mtu=told.path_mtu,
            now=self._scheduler.now_ns,
            psn=told.psn,
            max_rd_atomic=told.max_rd_atomic,
            min_rnr_timer=1,
        )
        region = nic.register(self._process, self._buffer.start, self._buffer.length, walk=True)
        connection = Connection(nic, client, line, told, region)
        client.completed = line.spoke = self._wake
        self._home.when_killed(self._wake)
        return connection

    def _exchange(self, nic: NicHost, client: HostClient, line: Line, replaces: int) -> Procedure[Attached]:
        try:
            owners = yield from self._owner.until_up()
        except ServerGone as problem:
            raise PeerError("nobody answers") from problem
        nonce, here = bytes(NONCE_BYTES), nic.nic.endpoint
        attach = Attach(
            share=self._name,
            qpn=client.client.qp.qpn,
            psn=PSN,
            gid=here.gid,
            port=here.port,
            path_mtu=self._home.mtu,
            max_rd_atomic=MAX_RD_ATOMIC,
            replaces=replaces,
        )
        attach.proof = proof_of(attach, self._token, nonce)
        yield Work("asks to be attached")
        if not self._owner.is_run_by(owners):
            raise PeerError("the owner's server went away")
        answer = self._owner.attach(attach, nonce, line)
        yield Work("is answered")
        if isinstance(answer, Denied):
            raise AttachRefused(answer.message, code=answer.code)
        if line.cause:
            raise PeerError(f"the connection ended: {line.cause}")
        if not self._home.is_run_by(nic):
            raise ServerGone(f"the server at {self._home.name} went away")
        return answer
