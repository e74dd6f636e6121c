"""Real recordings, sharded once per test session, and a server to read them from."""

import http.server
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def real_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the two real runs at 4 mm (110 and 82 frames at their own TRs, resampled to 2 s)."""
    from boldforge.data_shards import DataRecipe, build_shards, find_runs

    out = tmp_path_factory.mktemp("real-shards")
    build_shards(find_runs(DATA).runs, out, DataRecipe(grid="mni4mm", tr=2.0))
    return out


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """A file server that knows byte ranges (or not), keeps a list of what was asked, and can be told to fail."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        if self.server.failures:
            self.server.failures.pop()
            return self.send_error(503)
        path = Path(self.directory, self.path.lstrip("/"))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and self.server.knows_ranges:
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return self.wfile.write(data)

    def log_message(self, *message):
        pass


@pytest.fixture
def serve() -> Callable[[Path], AbstractContextManager[http.server.ThreadingHTTPServer]]:
    """Serve a folder over HTTP on this machine; the server has `url`, `asked`, `failures` and `knows_ranges`."""

    @contextmanager
    def serving(folder: Path) -> Iterator[http.server.ThreadingHTTPServer]:
        handler = partial(RangeHandler, directory=str(folder))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            server.asked, server.failures, server.knows_ranges = [], [], True
            server.url = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield server
            server.shutdown()
            thread.join()

    return serving
