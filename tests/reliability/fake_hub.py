"""A hub with one model, owner/bert, or one data set, owner/texts, that works or fails in a given way."""

import http.server
import json
import re
import time

REVISION = "89abcdef0123456789abcdef0123456789abcdef"


def handler(files: dict[str, bytes], downloaded: list[str], behaviour: str = "working"):
    """The request handler of a hub with these files. It appends to `downloaded` the names of the requested files.

    behaviour: working, slow, disconnecting, stalling (in the middle of the weights), failing, silent or "not a hub".
    """
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            path = self.path.split("?")[0]
            file = re.fullmatch(f"(/owner/bert|/datasets/owner/texts)/resolve/{REVISION}/(.*)", path)
            name = file[2] if file else ""
            if behaviour == "silent":
                time.sleep(1000)
            if behaviour == "failing":
                return self.send_error(503)
            if "/tree/" in path:
                content = json.dumps([{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40}
                                      for path in sorted(files)]).encode()
            elif path.startswith(("/api/models/", "/api/datasets/")):
                siblings = [{"rfilename": path} for path in sorted(files)]
                content = json.dumps({"id": "owner/bert", "sha": REVISION, "siblings": siblings}).encode()
                content = b"<html>" if behaviour == "not a hub" else content
            elif name in files:
                content = files[name]
                downloaded.append(name)
            else:
                return self.send_error(404)
            self.send_response(200)
            tag = f"{len(content)}-{name}".replace("/", "-")
            for header, value in (("Content-Length", len(content)), ("ETag", f'"{tag}"'), ("X-Repo-Commit", REVISION)):
                self.send_header(header, str(value))
            self.end_headers()
            if not body:
                return
            if name != "model.safetensors":
                self.wfile.write(content)
            elif behaviour in ("disconnecting", "stalling"):
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if behaviour == "stalling":
                    time.sleep(1000)
                self.close_connection = True
            else:
                for begin in range(0, len(content), -(-len(content) // 10)):
                    self.wfile.write(content[begin : begin + -(-len(content) // 10)])
                    time.sleep(0.3 * (behaviour == "slow"))

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *_):
            pass

    return Hub
