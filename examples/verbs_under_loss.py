"""Test an RDMA program where one packet in twenty is lost: verbs_under_loss.py [CAPTURE.pcapng, for Wireshark]."""

import sys
import tempfile
from pathlib import Path

import numpy as np

import nopin
from nopin import SendWr, Sge, WcStatus, WrOpcode
from nopin.lab.servers import LocalServer

N, BYTES = 100, 64 << 10
TROUBLE = ",".join(["loss=0.05", "seed=7", *(f"pcap={file}" for file in sys.argv[1:])])

with (
    tempfile.TemporaryDirectory() as folder,
    LocalServer(Path(folder) / "here.sock", ["--chaos", TROUBLE]) as near,
    LocalServer(Path(folder) / "there.sock") as far,  # two servers, so that there is a wire between them
    nopin.Device(near.socket_path) as here,
    nopin.Device(far.socket_path) as there,
):
    source, target = np.random.default_rng(7).integers(0, 256, (N, BYTES), np.uint8), np.zeros((N, BYTES), np.uint8)
    pd, cq = here.alloc_pd(), here.create_cq(N)
    ours, theirs = pd.create_qp(cq), there.alloc_pd().create_qp(there.create_cq(1))
    ours.connect(theirs.endpoint)
    theirs.connect(ours.endpoint)
    local, remote = pd.register(source, access="l"), theirs.pd.register(target, access="w")
    for i in range(N):
        sge = Sge(local.address + i * BYTES, BYTES, local.lkey)
        ours.post_send(SendWr(WrOpcode.RDMA_WRITE, [sge], remote_address=remote.iova + i * BYTES, rkey=remote.rkey))
    completions = cq.wait(N, timeout=30.0)
    assert all(wc.status is WcStatus.SUCCESS for wc in completions), completions
    n_resent = sum(row.get("resent_pkts", 0) for row in here.stat() if row["kind"] == "dev")
    print(f"{N} messages written, {n_resent} packets sent again")
    print("every byte is right" if (source == target).all() else "BYTES ARE WRONG")
