import asyncio, os, signal, socket
from urllib.parse import urlsplit
from tests.cortex.http.test_tls import *

async def test_x(process):
    address = urlsplit(process.url); context = trusting(); sockets=[]
    def connect_all():
        for _ in range(700):
            sockets.append(socket.create_connection((str(address.hostname), address.port)))
    pid = process.process.pid
    os.kill(pid, signal.SIGSTOP)
    await asyncio.to_thread(connect_all)
    os.kill(pid, signal.SIGCONT)
    async def hand(sock):
        sock.setblocking(False)
        r, w = await asyncio.open_connection(sock=sock, ssl=context, server_hostname="127.0.0.1")
        w.close()
    results = await asyncio.gather(*map(hand, sockets), return_exceptions=True)
    failed = [r for r in results if isinstance(r, BaseException)]
    assert not failed, (len(failed), failed[:2])
