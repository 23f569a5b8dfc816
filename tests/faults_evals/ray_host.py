"""A Ray cluster that outlives the reconcilers that use it; ends when its standard input does.

Writes {"address": HOST:PORT, "token": file} as one line to standard output when it is up.
"""

from __future__ import annotations

import json
import os
import sys

from longspan.cluster.ray_local import local_cluster


def main() -> None:
    """Serve until standard input ends."""
    with local_cluster(int(sys.argv[1])) as ray:
        address = ray.get_runtime_context().gcs_address
        print(json.dumps({"address": address, "token": os.environ["RAY_AUTH_TOKEN_PATH"]}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
