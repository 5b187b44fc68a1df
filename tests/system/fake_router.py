"""A router that answers UPnP as it likes, for tests: run inside a network namespace, it is told how.

    python fake_router.py LAN-ADDRESS BEHAVIOUR

Says "ready" once it listens. Each behaviour is one fault; `good` has none.
"""

from __future__ import annotations

import re
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

PORT: Final = 5000
GROUP: Final = "239.255.255.250"
SERVICE: Final = "urn:schemas-upnp-org:service:WANIPConnection:1"
DESCRIPTION: Final = f"""<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><device>
<deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType><serviceList><service>
<serviceType>urn:schemas-upnp-org:service:WANCommonInterfaceConfig:1</serviceType>
<controlURL>/cif</controlURL></service></serviceList><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType><serviceList><service>
<serviceType>{SERVICE}</serviceType><controlURL>/ctl</controlURL></service></serviceList>
</device></deviceList></device></deviceList></device></root>"""
HOSTS: Final = {
    "double-nat": "192.168.77.2", "carrier": "100.64.0.9", "loopback": "127.0.0.1", "down": "",
    "poetry": "shall I compare thee", "binary": "\udcff\udcfe", "long": "1" * 100_000,
}  # fmt: skip
"""External address by behaviour."""
ERRORS: Final = {"refuses": (606, "Action not authorized"), "for-ever": (725, "x"), "conflict": (718, "x")}
LEASES: Final = {"short": 5, "negative": -1, "endless-lease": 2**40}


class Router(BaseHTTPRequestHandler):
    """One request."""

    behaviour = ""
    entries: dict[str, tuple[str, str, str]] = {}  # noqa: RUF012  # one router, one table

    def do_GET(self) -> None:
        self._flood()
        self._answer(200, DESCRIPTION)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        action = self.headers["SOAPAction"].rpartition("#")[2].strip('"')
        said = dict(re.findall(r"<(New\w+)>([^<]*)<", body))
        port = said.get("NewExternalPort", "")
        if action == "AddPortMapping" and self.behaviour in ERRORS:
            self._error(*ERRORS[self.behaviour])
        elif action == "AddPortMapping":
            self.entries[port] = (
                said["NewInternalClient"], said["NewInternalPort"], said["NewPortMappingDescription"],
            )  # fmt: skip
            print("added", port, said["NewLeaseDuration"], flush=True)
            self._result(action, "")
        elif action == "DeletePortMapping" and self.entries.pop(port, None) is None:
            self._error(714, "NoSuchEntryInArray")
        elif action == "DeletePortMapping":
            print("deleted", port, flush=True)
            self._result(action, "")
        elif action == "GetSpecificPortMappingEntry":
            self._entry(action, port)
        elif action == "GetExternalIPAddress":
            host = HOSTS.get(self.behaviour, "11.5.0.1")
            self._result(action, f"<NewExternalIPAddress>{host}</NewExternalIPAddress>")
        else:
            self._result(
                action, "<NewConnectionStatus>Connected</NewConnectionStatus><NewUptime>9</NewUptime>"
            )

    def _entry(self, action: str, port: str) -> None:
        entry = ("192.168.5.99", "80", "camera") if self.behaviour == "taken" else self.entries.get(port)
        if entry is None:
            self._error(714, "NoSuchEntryInArray")
            return
        client, inner, name = entry
        lease = LEASES.get(self.behaviour, 3600)
        self._result(
            action,
            f"<NewInternalPort>{inner}</NewInternalPort><NewInternalClient>{client}</NewInternalClient>"
            f"<NewEnabled>1</NewEnabled><NewPortMappingDescription>{name}</NewPortMappingDescription>"
            f"<NewLeaseDuration>{lease}</NewLeaseDuration>",
        )

    def _flood(self) -> None:
        """More than anybody should read, or slower than anybody should wait."""
        if self.behaviour not in ("endless", "endless-header", "drips"):
            return
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"\r\n" * (self.behaviour != "endless-header"))
        try:
            while True:
                self.wfile.write(b"x" * (1 if self.behaviour == "drips" else 1 << 20))
                time.sleep(0.2 * (self.behaviour == "drips"))
        except OSError:
            sys.exit()

    def _result(self, action: str, text: str) -> None:
        self._answer(200, self._soap(f'<u:{action}Response xmlns:u="{SERVICE}">{text}</u:{action}Response>'))

    def _error(self, code: int, text: str) -> None:
        fault = (
            f"<UPnPError><errorCode>{code}</errorCode><errorDescription>{text}</errorDescription></UPnPError>"
        )
        self._answer(500, self._soap(f"<s:Fault><detail>{fault}</detail></s:Fault>"))

    def _soap(self, text: str) -> str:
        return f'<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>{text}</s:Body></s:Envelope>'

    def _answer(self, status: int, text: str) -> None:
        data = b"\xff<" * 5000 if self.behaviour == "garbage" else text.encode(errors="surrogateescape")
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def discovered(host: str) -> None:
    """Tell whoever searches where the description is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 1900))
        group = struct.pack("4s4s", socket.inet_aton(GROUP), socket.inet_aton(host))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        print("ready", flush=True)
        while True:
            asked, who = sock.recvfrom(2000)
            kind = re.search(rb"ST: *([^\r]+)", asked)
            if kind is not None:
                answer = f"HTTP/1.1 200 OK\r\nST: {kind[1].decode()}\r\nUSN: uuid:1\r\n"
                answer += f"LOCATION: http://{host}:{PORT}/root.xml\r\n\r\n"
                sock.sendto(answer.encode(), who)


if __name__ == "__main__":
    Router.behaviour = sys.argv[2]
    server = ThreadingHTTPServer((sys.argv[1], PORT), Router)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    discovered(sys.argv[1])
