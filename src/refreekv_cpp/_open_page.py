"""python -m refreekv_cpp._open_page ADDRESS PATH PID: opens a page of a server once it has loaded its model.

It ends with the server, whose process started it.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.error
import urllib.request
import webbrowser


def is_ready(address: str) -> bool:
    """Whether a llama-server has loaded its model."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{address}/health", timeout=5):
            return True
    except urllib.error.HTTPError as error:  # it is loading
        error.close()
        return False
    except OSError:
        return False


def main(address: str, path: str, server: int) -> None:
    """server: the number of its process."""
    while not is_ready(address):
        if os.getppid() != server:  # it is gone
            return
        time.sleep(0.5)
    webbrowser.open(address + path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
