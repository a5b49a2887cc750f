"""One replica in a process of its own, for tests that kill it: python replicas.py ENDPOINTS RUN_ID NUMBER PATIENCE."""

from __future__ import annotations

import json
import sys
import threading

from holdfast.elastic.rendezvous.endpoints import Endpoints, _listen
from holdfast.elastic.rendezvous.replica import Patience, Replica

endpoints, number = Endpoints.parse(sys.argv[1]), int(sys.argv[3])
listener = _listen(endpoints.addresses[number][1])
assert listener is not None
replica = Replica(endpoints, number, listener, sys.argv[2], Patience(**json.loads(sys.argv[4])))
threading.Event().wait()
