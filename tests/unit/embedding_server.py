"""A small HTTP server on this machine that answers like /v1/embeddings, and fails as it is told."""

import hashlib
import json
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np

DIM = 12
LONGEST = 200  # characters


def vector_of(text: str, model: str = "tiny") -> np.ndarray:
    """What the server gives for a text: not of unit length."""
    seed = int.from_bytes(hashlib.blake2b(f"{model}\0{text}".encode(), digest_size=8).digest())
    return np.random.default_rng(seed).normal(0.2, 1.0, DIM).astype(np.float32)


class EmbeddingServer(ThreadingHTTPServer):
    """Counts requests; `failures` are taken one by one, before it answers properly.

    A failure is a status, "cut" (the connection ends), or a function that changes the proper answer.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.failures, self.times, self.sizes, self.keys = [], [], [], []
        self.always, self.weights, self.noise = None, "tiny", 0.0
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def api_base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def embeddings(self, texts: list[str]) -> list[dict]:
        noise = np.random.default_rng(len(self.times)).normal(0, self.noise, DIM)
        items = [
            {"object": "embedding", "index": row, "embedding": (vector_of(text, self.weights) + noise).tolist()}
            for row, text in enumerate(texts)
        ]
        return items[::-1]  # the order is told by `index` alone

    def handle_error(self, request, client_address):
        """A connection that was cut is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.times.append(time.monotonic())
        server.sizes.append(len(body["input"]))
        server.keys.append(self.headers.get("Authorization"))
        failure = server.failures.pop(0) if server.failures else server.always
        if failure == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if isinstance(failure, int):
            return self.answer({"error": {"message": f"{'no ' * 45}{self.headers.get('Authorization')}"}}, failure)
        if self.path != "/v1/embeddings" or body["model"] != "tiny":
            return self.answer({"error": {"message": f"there is no {body['model']}"}}, 404)
        if any(len(text) > LONGEST for text in body["input"]):
            return self.answer({"error": {"message": "maximum context length exceeded"}}, 400)
        answer = {"object": "list", "model": "tiny", "data": server.embeddings(body["input"]), "usage": {}}
        self.answer(failure(answer) if failure else answer)

    def answer(self, value, status: int = 200):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(content)
